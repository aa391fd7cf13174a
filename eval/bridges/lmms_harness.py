"""How is a task of lmms_eval run? That harness asks and scores; our engine sees the images and answers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from eval.bridges.asking import Asker
from eval.bridges.bridge import Found, found_in
from eval.settings import TaskSettings
from shared.errors import UserError, nearest


def load(name: str, settings: TaskSettings) -> Any:
    """That harness's task manager, which knows the name.

    Raises:
        UserError: an unknown name.
    """
    manager = _manager(settings.data.path)
    if name not in manager.all_tasks:
        guess = nearest(name, manager.all_tasks)
        hint = f" Did you mean lmms_eval:{guess}?" if guess else ""
        raise UserError(f"lmms_eval has no task {name!r} among its {len(manager.all_tasks)}.{hint}")
    return manager


def evaluate(name: str, settings: TaskSettings, asker: Asker, folder: Path) -> Found:
    """Run the task. Images are kept as files below the folder.

    Raises:
        UserError: data that cannot be had, a task that shows more than images.
    """
    from lmms_eval.evaluator import simple_evaluate

    from eval.bridges.lmms_model import AskedModel

    manager = load(name, settings)
    try:
        results = simple_evaluate(
            model=AskedModel(asker, folder / "images"),
            tasks=[name],
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            log_samples=True,
            verbosity="WARNING",
        )
    except (OSError, RuntimeError, LookupError, ImportError) as error:
        raise UserError(f"lmms_eval:{name} cannot be run: {type(error).__name__}: {error}") from error
    return found_in(results)


@lru_cache(maxsize=1)
def _manager(folder: str | None) -> Any:
    """Knows all tasks of that harness, which takes seconds to find out, or those in a folder alone."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=folder, include_defaults=folder is None)
