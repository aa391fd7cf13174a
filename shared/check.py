"""Can a run start? What can be known without loading a model: names, files, prompts, idle settings."""

from __future__ import annotations

import math
from typing import Any

from shared.config import RunConfig
from shared.config_data import PromptSource
from shared.data.offline import check_offline
from shared.data.run_prompts import load_run_prompts
from shared.errors import ConfigError
from shared.models.layer_choice import keep_layers
from shared.models.loading import check_model_folder
from shared.models.quantization import check_quantized_student
from shared.models.references import ModelRef, resolve_path
from shared.objectives.objective import build_objective
from shared.workspace import Workspace

SMOKE_PROMPTS, SMOKE_HELDOUT, SMOKE_TOKENS = 8, 4, 16


def check_config(config: RunConfig, *, models: bool = True) -> dict[str, object]:
    """What the run will be, as facts by name.

    Args:
        config: the run.
        models: whether they are there to be looked at; a recipe makes some of them first.

    Raises:
        UserError: a missing file or model, unusable prompts, a setting that cannot take effect.
    """
    objective = build_objective(config.objective.name, config.objective.parameters)
    Workspace(config.folder).refuse_other(config)
    layers = _check_models(config) if models else None
    if config.student.prune is not None and layers is not None:
        # what block influence will be is not known yet, but how many blocks it drops is
        keep_layers(config.student.prune, layers, [0.0] * layers)
    train, heldout, notes = load_run_prompts(config.prompts, objective, seed=config.seed)
    objective = config.objective.build(sorted({sample.task for sample in train}))
    offline = config.generation.offline
    if offline.teacher is not None:
        check_offline(train, "teacher", offline.teacher)
    if offline.student is not None:
        check_offline(train, "student", offline.student)
    pairs = len(train) * config.generation.draws
    of_round = math.ceil(pairs / config.training.pairs_per_step)
    steps = of_round * config.training.rounds
    refresh = config.generation.refresh
    if refresh is not None and refresh >= of_round:
        raise ConfigError(
            f"no effect of generation.refresh: {refresh} in rounds of {of_round} steps; the student "
            "answers anew in every round anyway. Lower or remove it."
        )
    between = config.training.evaluate_steps
    if between is not None and between >= steps:
        raise ConfigError(
            f"no effect of training.evaluate_steps: {between} in a run of {steps} steps; rounds' ends are "
            "measured anyway. Lower or remove it."
        )
    return {
        "run": config.name,
        "folder": str(config.folder),
        **({"teacher": _named(config.teacher.model, models)} if config.teacher is not None else {}),
        "student": f"{_named(config.student.model, models)} ({config.student.how})",
        **_cache_facts(config),
        "objective": objective.name,
        "responses by": ", ".join(objective.sides),
        "training prompts": len(train),
        "held-out prompts": len(heldout),
        **_written_facts(config),
        **({"left out": "; ".join(notes)} if notes else {}),
        "optimiser steps": steps,
    }


def _named(ref: ModelRef, models: bool) -> str:
    """A model's name, and whether it is looked for on the hub: a misspelt folder is."""
    on_hub = models and ref.name != "teacher" and resolve_path(ref.name) is None
    return f"{ref.name}, from the hub" if on_hub else ref.name


def _cache_facts(config: RunConfig) -> dict[str, object]:
    cache = config.teacher.cache if config.teacher is not None else None
    if cache is None:
        return {}
    return {"teacher cached": f"top {cache.top_k}, in {cache.folder or config.folder}"}


def _written_facts(config: RunConfig) -> dict[str, object]:
    counts = [f"{s.written.count} of {place}" for place, s in config.prompts.written.items() if s.written]
    return {"written by the teacher": f"{', '.join(counts)}, when the run starts"} if counts else {}


def _check_models(config: RunConfig) -> int | None:
    """The number of blocks of the model that the student starts from, where that is known."""
    if config.teacher is not None:
        _check_model("teacher", config.teacher.model, config)
    values = _check_model("student", config.origin, config)
    if config.origin.quantization is not None or "quantization_config" in values:
        check_quantized_student(config.student)
    layers: int | None = values.get("text_config", values).get("num_hidden_layers")
    return layers


def _check_model(role: str, ref: ModelRef, config: RunConfig) -> dict[str, Any]:
    """The model's configuration, where the model is a local folder; else nothing."""
    if ref.revision is not None and resolve_path(ref.name) is not None:
        raise ConfigError(
            f"no effect of {role}.model.revision: {ref.name!r} is a local path, and only the hub has "
            "revisions. Remove it."
        )
    values = check_model_folder(ref)
    if values is None:
        return {}
    text = values.get("text_config", values)
    context, answer = text.get("max_position_embeddings"), config.generation.max_new_tokens
    if context is not None and answer >= context:
        raise ConfigError(
            f"generation.max_new_tokens: {answer} leaves no room for a prompt in the context of {context} "
            f"tokens of the {role}, {ref.name!r}. Lower it."
        )
    return values


def smoke_config(config: RunConfig) -> RunConfig:
    """The same run on a handful of samples, in a folder of its own."""

    def limited(sources: tuple[PromptSource, ...], limit: int) -> tuple[PromptSource, ...]:
        return tuple(source.limited(max(1, limit // len(sources))) for source in sources)

    def short(task: str | dict[str, Any]) -> dict[str, Any]:
        given = {"name": task} if isinstance(task, str) else task
        return {**given, "limit": SMOKE_HELDOUT, "max_new_tokens": SMOKE_TOKENS}

    prompts, generation, training = config.prompts, config.generation, config.training
    prune, evaluation = config.student.prune, config.evaluation
    small = {
        "name": f"{config.name}-smoke",
        "output": f"{config.folder}-smoke",
        "prompts": prompts.model_copy(
            update={
                "train": limited(prompts.train, SMOKE_PROMPTS),
                "heldout": limited(prompts.heldout, SMOKE_HELDOUT),
            }
        ),
        "generation": generation.model_copy(
            update={"max_new_tokens": min(generation.max_new_tokens, SMOKE_TOKENS)}
        ),
        "training": training.model_copy(
            update={
                "rounds": min(training.rounds, 2),
                "pairs_per_step": min(training.pairs_per_step, SMOKE_PROMPTS // 2),
                "evaluate_steps": training.evaluate_steps and 1,
            }
        ),
        # a shared cache is of the whole run's responses
        "teacher": config.teacher
        and config.teacher.model_copy(
            update={
                "cache": config.teacher.cache and config.teacher.cache.model_copy(update={"folder": None})
            }
        ),
        "evaluation": evaluation.model_copy(
            update={
                "limit": SMOKE_HELDOUT,
                "max_new_tokens": SMOKE_TOKENS,
                "tasks": tuple(map(short, evaluation.tasks)),
            }
            if evaluation.tasks or evaluation.suites
            else {}
        ),
        "student": config.student.model_copy(
            update={"prune": prune.model_copy(update={"calibration_prompts": 2})}
            if prune and prune.block_influence
            else {}
        ),
    }
    return config.model_copy(update=small)
