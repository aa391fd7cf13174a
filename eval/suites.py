"""Which tasks does a name on the command line mean: a task, a suite, a file, a task of the user's own?"""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from eval.bridges import bridged_task, is_bridged
from eval.settings import TaskSettings, merged, nested, task_settings
from eval.task import Task
from eval.tasks import TASKS
from shared.config import EvaluationConfig
from shared.errors import ConfigError, UserError, unknown_name
from shared.yaml_text import read_yaml

ENTRY_POINT_GROUP = "vlm_distill.tasks"

SUITE_PREFIX = "suite:"
SUITES: dict[str, tuple[str, ...]] = {
    "instruction": (
        "alpaca_eval",
        "evol_instruct",
        "ultrafeedback",
        "mt_bench",
        "vicuna",
        "self_instruct",
    ),
    "code": ("humaneval", "mbpp"),
    "math": ("gsm8k", "math"),
    "vqa": ("vqav2", "okvqa", "textvqa", "chartqa", "docvqa", "pope", "easy_vqa", "daquar"),
}


class Job(NamedTuple):
    """A task with its settings in this run."""

    task: Task
    settings: TaskSettings


class Registry:
    """All tasks that can be named here.

    Args:
        includes: Python files of the user's, each with `TASK` or `TASKS`; they are run.
    """

    def __init__(self, includes: Sequence[Path] = ()) -> None:
        self._included: dict[str, Task] = {}
        for path in includes:
            for task in _tasks_in(path):
                if task.name in self.names():
                    raise UserError(f"--include {path}: there is a task {task.name!r} already. Rename yours.")
                self._included[task.name] = task

    def names(self) -> list[str]:
        """Ours, then those of installed packages, then the included."""
        return [*TASKS, *(entry.name for entry in _entries()), *self._included]

    def task(self, name: str) -> Task:
        """The task of a name.

        Raises:
            UserError: there is none.
        """
        if name in self._included:
            return self._included[name]
        if is_bridged(name):
            return bridged_task(name)
        if name in TASKS:
            task: Task = importlib.import_module(TASKS[name]).TASK
            return task
        for entry in _entries():
            if entry.name == name:
                loaded = entry.load()
                if not isinstance(loaded, Task) or loaded.name != name:
                    raise UserError(f"entry point {entry.value!r} is no Task named {name!r}.")
                return loaded
        raise UserError(
            unknown_name("task or suite", name, {*self.names(), *SUITES})
            + " A file of your own: --include FILE.py. Of other harnesses: lm_eval:NAME, lmms_eval:NAME."
        )

    def task_in(self, folder: Path) -> Task:
        """The task of an evaluated folder, which is named like it."""
        if not is_bridged(folder.name):
            return self.task(folder.name)
        from eval.bridges.bridge import task_in  # it needs what needs this module

        return task_in(folder)

    def jobs(self, names: Sequence[str], words: Sequence[str] = ()) -> list[Job]:
        """The tasks that names stand for, each once, with their settings.

        Args:
            names: Tasks, suites, YAML files.
            words: `key=value` for every task, or `TASK.key=value` for one.

        Raises:
            UserError: an unknown name, or settings that cannot be used.
        """
        wanted: dict[str, dict[str, Any]] = {}
        for name in names:
            for member, values in self._expanded(name).items():
                wanted[member] = merged(wanted.get(member, {}), values)
        own = [word for word in words if word.partition("=")[0].split(".")[0] in wanted]
        for word in words:
            name = word.partition(".")[0]
            if word not in own and name in self.names():
                raise ConfigError(f"{word!r}: {name} is not among the tasks named: {', '.join(wanted)}.")
        common = nested([word for word in words if word not in own])
        if "data" in common and len(wanted) > 1:
            example = f"{next(iter(wanted))}.data.path=FILE"
            raise ConfigError(
                f"data.… is for one task, and there are {len(wanted)}: write TASK.data.…, such as {example}"
            )
        specific = nested(own)
        jobs = []
        for name, values in wanted.items():
            task = self.task(name)
            settings = merged(merged(values, common), specific.get(name, {}))
            jobs.append(Job(task, task_settings(task, settings, source=f"settings of {name}")))
        return jobs

    def of_run(self, evaluation: EvaluationConfig) -> list[Job]:
        """The tasks of a run's `evaluation:`, each once. Its limit and its judge are for all that take them.

        Raises:
            UserError: an unknown name, or settings that cannot be used.
        """
        source = "evaluation.tasks"
        wanted: dict[str, dict[str, Any]] = {}
        for suite in evaluation.suites:
            wanted |= self._expanded(suite if suite.startswith(SUITE_PREFIX) else SUITE_PREFIX + suite)
        for name, values in _named_settings(evaluation.tasks, source).items():
            for member, more in self._expanded(name).items():
                wanted[member] = merged(wanted.get(member, {}), merged(more, values))
        tasks = {name: self.task(name) for name in wanted}
        judged = [name for name, task in tasks.items() if task.judged]
        if evaluation.judge is not None and not judged:
            raise ConfigError("no effect of evaluation.judge: none of the tasks takes one. Remove it.")
        jobs = []
        for name, task in tasks.items():
            common: dict[str, Any] = {"limit": evaluation.limit, "max_new_tokens": evaluation.max_new_tokens}
            if name in judged:
                common["judge"] = evaluation.judge
            given = {key: value for key, value in common.items() if value is not None}
            values = merged(given, wanted[name])
            jobs.append(Job(task, task_settings(task, values, source=f"{source}, {name}")))
        return jobs

    def _expanded(self, name: str) -> Mapping[str, dict[str, Any]]:
        if name.endswith((".yaml", ".yml")):
            return _read_suite(Path(name))
        suite = name.removeprefix(SUITE_PREFIX)
        if name == suite and name in self.names():
            return {name: {}}  # `math` is a task, and suite:math the suite of that name
        if name != suite and suite not in SUITES:
            raise UserError(unknown_name("suite", suite, SUITES))
        return {task: {} for task in SUITES.get(suite, (name,))}


def _read_suite(path: Path) -> Mapping[str, dict[str, Any]]:
    """`tasks:` with names, or mappings of a name and settings."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"suite {path} cannot be read: {error.strerror}.") from None
    entries = values.get("tasks") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not entries or set(values) != {"tasks"}:
        raise ConfigError(
            f"{path}: a suite is `tasks:` with a list of names, or of `{{name: ..., limit: 100}}`."
        )
    return _named_settings(entries, str(path))


def _named_settings(entries: Sequence[object], where: str) -> dict[str, dict[str, Any]]:
    """The settings of each entry of a list of tasks, by name."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        given = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise ConfigError(f"{where}: {entry!r} is no task; write a name, or name: NAME with settings.")
        if given["name"] in found:
            raise ConfigError(f"{where}: {given['name']} stands twice.")
        found[given["name"]] = {key: value for key, value in given.items() if key != "name"}
    return found


def _tasks_in(path: Path) -> Iterable[Task]:
    if not path.is_file():
        raise UserError(f"--include {path}: no such file.")
    spec = importlib.util.spec_from_file_location(f"included_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--include {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)  # the user named it: it is the user's own code
    except (Exception, SystemExit) as error:
        raise UserError(f"--include {path}: {own_mistake(error, path)}. Mend the file.") from error
    tasks = getattr(module, "TASKS", None) or [getattr(module, "TASK", None)]
    if not all(isinstance(task, Task) for task in tasks):
        raise UserError(f"--include {path}: needs TASK = Task(...) or TASKS = [Task(...), ...].")
    return list(tasks)


def own_mistake(error: BaseException, path: Path) -> str:
    """What went wrong in a user's own file, and in which line of it."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    return f"line {line}: {what}" if line else what


def _entries() -> list[Any]:
    return list(entry_points(group=ENTRY_POINT_GROUP))
