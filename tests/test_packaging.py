"""Is what a user installs complete? Every shipped file is in the wheel, nothing else, and templates work."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from shared.check import check_config, smoke_config
from shared.config import RunConfig
from shared.config_files import load_config, load_values
from shared.sweep import open_sweep
from text_distill.config import TextRunConfig
from vlm_distill.config import VlmRunConfig

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("configs", "eval", "shared", "text_distill", "vlm_distill")
# by folder below configs/
CONFIG_CLASSES: dict[str, type[RunConfig]] = {"text": TextRunConfig, "vlm": VlmRunConfig}
LAUNCHES = "accelerate"  # says how processes are started, not what they run
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != LAUNCHES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def shipped_files() -> set[str]:
    files = (path for folder in SHIPPED for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy, so that it leaves nothing in the checkout and finds nothing of an older build."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*SHIPPED, "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, text=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_shipped_file_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == shipped_files()


def test_the_wheel_alone_writes_a_template_and_checks_it(wheel, tmp_path):
    packages, elsewhere = tmp_path / "packages", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(packages)

    def python(program: str, *arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(packages)}
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import eval, shared, text_distill; print(eval.__file__, shared.__file__, text_distill.__file__)"
    assert all(path.startswith(str(packages)) for path in python(where).split())
    (elsewhere / "configs" / "text").mkdir(parents=True)  # somebody else's, which is never looked into
    command_line = "from text_distill.cli import main; main()"
    template = next(path.stem for path in CONFIGS if path.parent.name == "text")
    assert template in python(command_line, "init", "list")
    python(command_line, "init", template)
    shipped = f"configs/text/{template}.yaml"  # in its comments; the copy names itself
    written = (elsewhere / f"{template}.yaml").read_text()
    assert written == (ROOT / shipped).read_text().replace(shipped, f"{template}.yaml")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_template_says_how_to_run_it_and_passes_the_check(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs are written below: a former one of other settings is not looked at
    where = config.relative_to(ROOT)
    text = config.read_text(encoding="utf-8")
    if "\nstages:" in text:  # a recipe, which tests/vlm_distill/test_config.py checks by its command line
        assert text.startswith("# ") and str(where) in text
        return
    assert where.parts[1] in CONFIG_CLASSES, (
        f"say in CONFIG_CLASSES which class reads configs/{where.parts[1]}/"
    )
    assert text.startswith("# ") and str(where) in text, "its first lines say what it does, and the command"
    if "\nsettings:" in text:
        sweep = open_sweep(load_values(config), CONFIG_CLASSES[where.parts[1]], str(config))
        assert sweep.total > len(sweep.config.settings) and len(sweep.config.seeds) >= 3
        return
    overrides = []
    if "hub:" in text:  # data that no test downloads: the rest of the file is checked with prompts of our own
        overrides = [
            f"prompts.{part}=[{{path: 'pkg://text_distill/prompts/everyday-{part}.jsonl'}}]"
            for part in ("train", "heldout")
        ]
        assert load_config(config, CONFIG_CLASSES[where.parts[1]]).prompts.train[0].hub is not None
    values = load_config(config, CONFIG_CLASSES[where.parts[1]], overrides)
    for package in set(re.findall(r"pkg://(\w+)/", text)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    facts = check_config(values)
    assert facts["run"] == config.stem, "a run is found by the name of its template"
    assert smoke_config(values).folder != values.folder
    check_config(smoke_config(values))


def test_declared_entry_points_lead_somewhere():
    adapters = PROJECT["entry-points"]["vlm_distill.adapters"]
    for target in (*PROJECT["scripts"].values(), *adapters.values()):
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), target


def imported_packages(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_every_package_that_is_imported_is_declared():
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"}
    asked_for = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    declared = {plain(re.match(r"[\w.-]+", line)[0]) for line in asked_for}
    providers = metadata.packages_distributions()
    for file in sorted(name for name in shipped_files() if name.endswith(".py")):
        for package in set(imported_packages((ROOT / file).read_text(encoding="utf-8"))):
            if package in SHIPPED or package in sys.stdlib_module_names:
                continue
            names = {plain(name) for name in providers.get(package, [package])}
            assert names & declared, f"{file} imports {package}, which pyproject.toml does not ask for"
