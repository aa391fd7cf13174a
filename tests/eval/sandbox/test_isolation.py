"""Which isolation is chosen, what the user is told, and what a probe finds."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.sandbox import isolation, world
from eval.sandbox.isolation import SandboxError, find_isolation, isolation_of_kind
from eval.sandbox.limits import Limits
from eval.sandbox.proof import Program, examine

PROGRAM = Program("p", "def f(): return 1", "assert f() == 1")
PATIENT = Limits(wall_s=60, cpu_s=30)


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    isolation._why_not.cache_clear()
    yield
    isolation._why_not.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    which = world.shutil.which

    def found(name: str, path: str | None = None) -> str | None:
        return None if name in names else which(name, path=path)

    monkeypatch.setattr(world.shutil, "which", found)


@pytest.mark.usefixtures("fresh_probe")
def test_without_any_isolation_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bwrap", "unshare")
    with pytest.raises(SandboxError) as refused:
        find_isolation()
    message = str(refused.value)
    for part in (
        "bwrap is not installed",
        "unshare is not installed",
        "--allow-unsafe-execution",
        "bubblewrap",
    ):
        assert part in message
    unsafe = find_isolation(allow_unsafe_execution=True)
    assert unsafe.kind == "none" and "no isolation" in unsafe.description
    assert examine(PROGRAM, unsafe, PATIENT).passed


@pytest.mark.usefixtures("fresh_probe")
def test_the_fallback_is_used_without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bwrap")
    try:
        assert find_isolation().kind == "unshare"
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("fresh_probe")
def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux; this is darwin"):
        find_isolation()


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize(
    ("old", "new", "broken"),
    [
        ("--unshare-net", [], "no network"),
        ("--unshare-pid", [], "own processes"),
        ("--remount-ro", ["--bind", tempfile.gettempdir(), "/tmp", "--remount-ro"], "no files of the host"),
    ],
)
def test_the_probe_finds_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, old: str, new: list[str], broken: str
) -> None:
    if isolation._why_not("bubblewrap") is not None:
        pytest.skip("bubblewrap does not work here")
    isolation._why_not.cache_clear()
    build = isolation._BUILD["bubblewrap"]

    def weaker(*arguments: object) -> list[str]:
        command = build(*arguments)  # type: ignore[arg-type]
        return [part for old_part in command for part in (new if old_part == old else [old_part])]

    monkeypatch.setitem(isolation._BUILD, "bubblewrap", weaker)
    reason = isolation._why_not("bubblewrap")
    assert reason is not None and broken in reason


def test_unsafe_execution_is_recognised_as_unsafe() -> None:
    assert isolation._why_not("none") is not None


@pytest.mark.parametrize("kind", ["bubblewrap", "unshare"])
def test_packages_can_be_shown_to_programs(kind: isolation.Kind, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("VALUE = 3")
    tmp_path.chmod(0o755)
    try:
        found = isolation_of_kind(kind, [str(tmp_path)])
    except SandboxError as error:
        pytest.skip(str(error))
    source = f"""
import shown
def f():
    try: open({str(tmp_path / "shown.py")!r}, "a")
    except OSError: return shown.VALUE
"""
    verdict = examine(Program("p", source, "assert f() == 3"), found, PATIENT)
    assert verdict.passed, verdict


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become an ordinary user")
@pytest.mark.parametrize("kind", ["bubblewrap", "unshare"])
def test_an_ordinary_user_can_isolate_too(kind: str, tmp_path: Path) -> None:
    system_python = "/usr/bin/python3"
    if subprocess.run([system_python, "-c", "import sys; assert sys.version_info >= (3, 11)"]).returncode:
        pytest.skip(f"{system_python} is no Python 3.11, and ours may be out of an ordinary user's reach")
    package = tmp_path / "eval" / "sandbox"
    package.mkdir(parents=True)
    source = Path(isolation.__file__).parent
    subprocess.run(["cp", "-r", str(source / "inside"), str(package)], check=True)
    shared = Path(isolation.__file__).parents[2] / "shared"
    (tmp_path / "shared").mkdir()
    for name in ("isolation.py", "world.py", "limits.py", "proof.py"):
        (package / name).write_bytes((source / name).read_bytes())
    (tmp_path / "shared" / "errors.py").write_bytes((shared / "errors.py").read_bytes())
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path)], check=True)
    code = f"""
from eval.sandbox.isolation import isolation_of_kind
from eval.sandbox.limits import Limits
from eval.sandbox.proof import Program, examine
source = "import os\\ndef f():\\n    try: os.chroot('/tmp')\\n    except PermissionError: return os.getuid()"
found = isolation_of_kind({kind!r})
print(found.description)
print(examine(Program("p", source, "assert f() in (0, 65534)"), found, Limits(wall_s=60, cpu_s=30)))
"""
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    for folder in reversed([tmp_path, *tmp_path.parents]):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest", "popen-gw")):
            folder.chmod(0o755)
    done = subprocess.run(
        [*drop, system_python, "-c", code], env=environment, cwd="/", capture_output=True, text=True
    )
    if "does not work here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert "without capabilities" in done.stdout and "passed" in done.stdout, done.stdout + done.stderr


def test_a_kind_is_probed_once() -> None:
    assert isinstance(isolation._why_not, functools._lru_cache_wrapper)
