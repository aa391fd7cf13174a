"""How is a task of lm_eval run? That harness asks and scores; our engine answers.

Generation goes through our engine as a chat; log-likelihoods through that harness's own class around the
local model, without a chat template, as that harness does it by default.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from eval.bridges.asking import Asker
from eval.bridges.bridge import Found, found_in
from eval.settings import TaskSettings
from shared.errors import ConfigError, UserError, nearest


def load(name: str, settings: TaskSettings) -> tuple[Any, dict[str, Any]]:
    """That harness's task manager, and its tasks behind a name: one, or those of a group.

    Raises:
        UserError: an unknown name, data that cannot be had, a task that we do not run.
    """
    manager = _manager(settings.data.path)
    if name not in manager.all_tasks:
        guess = nearest(name, manager.all_tasks)
        hint = f" Did you mean lm_eval:{guess}?" if guess else ""
        raise UserError(f"lm_eval has no task {name!r} among its {len(manager.all_tasks)}.{hint}")
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
    except (OSError, ValueError, RuntimeError, LookupError, ImportError) as error:
        raise UserError(f"lm_eval:{name} cannot be loaded: {type(error).__name__}: {error}") from error
    for task in tasks.values():
        _refuse(name, task, settings)
    return manager, tasks


def evaluate(name: str, settings: TaskSettings, asker: Asker, folder: Path) -> Found:
    """Run the task."""
    del folder
    from lm_eval import simple_evaluate

    from eval.bridges.lm_model import AskedModel

    manager, tasks = load(name, settings)
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    chat = kinds == {"generate_until"}
    if "generate_until" in kinds and not chat:
        raise UserError(
            f"lm_eval:{name} has tasks of several kinds ({', '.join(sorted(kinds))}): {', '.join(tasks)}. "
            "Name them one by one, as lm_eval:TASK."
        )
    results = simple_evaluate(
        model=AskedModel(asker, chat=chat),
        tasks=[name],
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=chat,
        log_samples=True,
    )
    return found_in(results)


@lru_cache(maxsize=1)
def _manager(folder: str | None) -> Any:
    """Knows all tasks of that harness, which takes seconds to find out, or those in a folder alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=folder is None)


def _refuse(name: str, task: Any, settings: TaskSettings) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"lm_eval:{name} runs programs that the model wrote, and that harness does not isolate them. "
            "Take humaneval or mbpp here, which are run in a sandbox."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"lm_eval:{name} shows images. Take the task of lmms_eval, or one of ours.")
    if settings.num_fewshot and task.get_config("num_fewshot") == 0:
        raise ConfigError(f"no effect of num_fewshot on lm_eval:{name}, which fixes it to 0. Remove it.")
