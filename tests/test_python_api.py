"""Does `distill` do from Python what the command line does? The documentation's example, and its refusals."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import text_distill
import vlm_distill
from runs import tiny_config
from shared.api import read_config
from shared.errors import ConfigError
from text_distill.config import TextRunConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_documentation_s_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(ROOT / "docs" / "PYTHON.md"), module_relative=False, verbose=False)
    assert results.attempted > 15 and results.failed == 0


def test_a_configuration_is_taken_from_whatever_holds_it(tmp_path):
    config = tiny_config(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(text := config.model_dump_json())
    assert text.startswith("{")
    mapping = {**config.model_dump(mode="json"), "output": tmp_path / "run"}  # paths may be paths
    for given in (config, mapping, path, str(path)):
        assert read_config(given, TextRunConfig, ()) == config
        assert read_config(given, TextRunConfig, ("seed=7",)).seed == 7


@pytest.mark.parametrize("distill", [text_distill.distill, vlm_distill.distill])
def test_mistakes_are_the_command_line_s(tmp_path, distill):
    with pytest.raises(ConfigError, match="no configuration file at"):
        distill(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"techer.*teacher"):
        distill({"name": "x", "techer": {}})
    (tmp_path / "recipe.yaml").write_text("name: x\nstages: [{name: a}]\n")
    with pytest.raises(ConfigError, match="is a recipe of several stages, and distill"):
        distill(tmp_path / "recipe.yaml")


def test_importing_it_stays_light():
    program = (
        "import sys; from text_distill import distill; from vlm_distill import distill; "
        "print([name for name in ('torch', 'transformers', 'typer', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
