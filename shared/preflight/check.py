"""What do a run's own two models make of its prompts, and what will it take?

First what tokenizers, processors and configurations tell: alignment, differences, lengths, memory, disk.
Then, where the weights are on this machine and fit into it, what only they tell: that a model is at distance
0 from itself along every path in use, and how long a round takes. Otherwise the time is worked out for GPUs
by their data sheets.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from shared.adapter import AdapterKind
from shared.config import RunConfig
from shared.config_data import PromptsConfig, PromptSource
from shared.data.prompts import STAND_IN_WORDS
from shared.data.run_prompts import load_run_prompts
from shared.errors import UserError
from shared.models.heads import causal_lm_of
from shared.models.layer_choice import keep_layers
from shared.models.loading import weights_are_local
from shared.models.pruning import blocks_of
from shared.models.references import ModelRef
from shared.models.vocabulary import shared_vocabulary
from shared.objectives.objective import build_objective
from shared.preflight.calibration import measure_sampling, measure_training
from shared.preflight.needs import AS_ASKED, Plan, estimate_time, size_up
from shared.preflight.page import Findings, duration, size
from shared.preflight.self_distance import distances_to_itself
from shared.preflight.sizing import outline, shape_of
from shared.preflight.survey import Readers, compare_models, count_tokens, show_alignment
from shared.progress import Speaker
from shared.session import open_session
from shared.training.layout import made_up_group
from shared.training.setup import open_accelerator
from shared.types import Sample
from shared.workspace import Workspace, peak_memory_bytes

IMAGE_PROMPTS = 256  # of each source, where every prompt goes through an image processor
MEASURED_PROMPTS = 64  # of each source, for what models are run on
WRITTEN_PROMPTS = 4  # the same, where the teacher has to write them here
PROBED_TOKENS = 64  # of a response, in the distance of a model to itself


def check_models(
    config: RunConfig, kind: AdapterKind, *, prompts: int, heldout: int, estimate: bool
) -> Findings:
    """Look at everything that the models can tell before a run.

    Args:
        config: checked already, as it says for itself.
        kind: opens adapters and loads models.
        prompts: to train on.
        heldout: held out.
        estimate: load no weights even where they are here.

    Raises:
        UserError: a model or prompts that cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    objective, found = build_objective(config.objective.name, config.objective.parameters), Findings()
    readers = _open_readers(config, kind)
    with tempfile.TemporaryDirectory() as folder:
        few = _few(config.prompts, IMAGE_PROMPTS) if readers.student.accepts_images else config.prompts
        kept = Path(folder) if readers.student.accepts_images else None
        train, held, _ = load_run_prompts(few, objective, seed=config.seed, folder=kept)
        if config.prompts.written:
            assumed = f"not there yet; taken to be {STAND_IN_WORDS} words long"
            found.add("Prompts that the teacher writes", [assumed])
        teacher, start = _outlines(config)
        if not _survey(found, config, readers, teacher, start, [*train, *held]):
            return found
        student = kind.make_student(config.student, start, readers.student, train, seed=config.seed)
        lengths = [readers.student.prompt_tokens(sample) for sample in train]
        plan = Plan(
            config, objective, readers,
            teacher=None if config.teacher is None else shape_of(teacher, config.teacher.model),
            student=shape_of(student, config.origin),
            prompts=prompts, heldout=heldout, prompt_tokens=statistics.fmean(lengths), longest=max(lengths),
        )  # fmt: skip
        absent = [ref.name for ref in _references(config) if not weights_are_local(ref)]
        elsewhere = estimate or bool(absent)  # on a GPU, then
        needed = size_up(found, plan, student, on_cpu=not (elsewhere or torch.cuda.is_available()))
        reason = AS_ASKED if estimate else _why_not_here(absent, needed)
        if reason is None:
            measured = config.model_copy(update={"prompts": _few(config.prompts, MEASURED_PROMPTS)})
            _measure(found, plan, measured, kind, Path(folder))
        else:
            estimate_time(found, plan, needed, reason)
    return found


def _few(prompts: PromptsConfig, limit: int) -> PromptsConfig:
    def limited(sources: Sequence[PromptSource]) -> tuple[PromptSource, ...]:
        return tuple(s.limited(WRITTEN_PROMPTS if s.written is not None else limit) for s in sources)

    return prompts.model_copy(update={"train": limited(prompts.train), "heldout": limited(prompts.heldout)})


def _open_readers(config: RunConfig, kind: AdapterKind) -> Readers:
    student = kind.open(config.origin, {})
    if config.teacher is None or config.student.starts_from_teacher:
        return Readers(None if config.teacher is None else student, student)
    return Readers(kind.open(config.teacher.model, {}), student)


def _outlines(config: RunConfig) -> tuple[Any, Any]:
    """Teacher and the student's start, pruned, on the meta device."""
    teacher = None
    if config.teacher is not None:
        teacher = outline(config.teacher.model, dtype=getattr(torch, config.teacher.dtype))
        teacher.requires_grad_(False)
    start = outline(config.origin, dtype=getattr(torch, config.student.dtype))
    if config.student.prune is not None:
        blocks = blocks_of(start)
        kept = keep_layers(config.student.prune, len(blocks), [0.0] * len(blocks))  # how many, not which
        del blocks[len(kept) :]
        causal_lm_of(start).config.get_text_config(decoder=True).num_hidden_layers = len(kept)
    return teacher, start


def _survey(
    found: Findings, config: RunConfig, readers: Readers, teacher: Any, start: Any, samples: Sequence[Sample]
) -> bool:
    """Whether the two models and the prompts go together."""
    models = [shape_of(model) for model in (teacher, start) if model is not None]
    by_length = sorted(samples, key=readers.student.prompt_tokens)
    shown, answer = by_length[len(by_length) // 2], config.generation.max_new_tokens
    vocabulary = None
    try:
        vocabulary = shared_vocabulary(
            (readers.teacher or readers.student).vocabulary,
            readers.student.vocabulary,
            teacher_width=models[0].width,
            student_width=models[-1].width,
        )
        show_alignment(found, readers, shown, vocabulary, answer)
    except UserError as error:
        found.problems.append(str(error))
        show_alignment(found, readers, shown, None, answer)
    compare_models(found, readers, shown, vocabulary, [model.width for model in models])
    count_tokens(
        found,
        readers,
        samples,
        [model.context for model in models],
        answer=answer,
        fails=config.prompts.over_length == "fail",
    )
    return not found.problems


def _references(config: RunConfig) -> list[ModelRef]:
    return [config.origin] if config.teacher is None else [config.teacher.model, config.origin]


def _why_not_here(absent: Sequence[str], needed: int) -> str | None:
    """Why the models are not loaded here, or None."""
    if absent:
        return f"the weights of {' and '.join(absent)} are not on this machine"
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"this machine has {size(there)} of memory" if needed > there else None


def _measure(found: Findings, plan: Plan, config: RunConfig, kind: AdapterKind, folder: Path) -> None:
    """What only the weights tell. Everything is written to a folder that goes away."""
    accelerator = open_accelerator(
        config.training.model_copy(update={"trackers": ()}), str(folder), config.name
    )
    session = open_session(
        config,
        kind,
        plan.objective,
        workspace=Workspace(folder),
        speaker=Speaker(quiet=True),
        accelerator=accelerator,
    )
    layouts, models = session.trainee.layouts, session.models
    by_length = sorted(session.train_samples, key=models.student_adapter.prompt_tokens)
    probes = [by_length[-1], by_length[0]]
    sides, tokens = plan.objective.sides, min(PROBED_TOKENS, plan.response_tokens)
    groups = [made_up_group(sample, models.student_adapter, tokens, sides) for sample in probes]
    lines = []
    read = [("student", session.trainee.student, models.student_adapter, layouts.student)]
    if models.teacher is not None:
        read.insert(0, ("teacher", models.teacher, models.teacher_adapter, layouts.teacher))
    for name, model, adapter, layout in read:
        mixed = name == "student" and config.training.mixed_precision == "bf16"
        distances = distances_to_itself(
            model,
            adapter,
            models.vocabulary,
            groups,
            layout,
            precision=accelerator.autocast() if mixed else contextlib.nullcontext(),
            dtype=torch.bfloat16 if mixed else next(model.parameters()).dtype,
        )
        for distance in distances:
            path = f"{name}, {layout}, {distance.backend}"
            found.facts[f"distance to itself: {path}"] = distance.nats
            lines.append(
                f"{path:28} {distance.nats:9.2g} nats a token (up to {distance.allowed:g} is rounding)"
            )
            if not distance.is_zero:
                found.problems.append(
                    f"the {path} path is {distance.nats:.3g} nats a token away from the same model reading "
                    "each answer alone: its mask, positions or images are read wrong there. Set "
                    "training.pair_layout: separate, or use another model."
                )
    found.add("Each model distilled into itself", [*lines, *layouts.notes])

    lines, seconds = [], {}
    for role in plan.samplers:
        sampled = measure_sampling(session, role, plan.answers)  # type: ignore[arg-type]
        seconds[f"sampling, {role}"] = sampled.round_s
        lines.append(
            f"{role} samples {sampled.batch_rows} answers together: {duration(sampled.reading_s)} for their "
            f"prompts, {duration(sampled.token_s)} a token"
        )
    trained = measure_training(session, plan.answers)
    seconds["training"] = trained.round_s
    lines.append(f"training: {trained.tokens_per_second:.0f} tokens a second")
    total = sum(seconds.values())
    shares = ", ".join(f"{name} {duration(each)}" for name, each in seconds.items())
    lines.append(f"a round of {plan.answers:,} prompts, if every answer is as long as it may be: {shares}")
    rounds = config.training.rounds
    lines.append(
        f"all {rounds} rounds: {duration(total * rounds)}, without held-out measurements and evaluation"
    )
    lines.append(f"peak memory of this check: {size(peak_memory_bytes())}")
    found.add("Time, from a few batches measured here", lines)
    found.facts["seconds of a round"] = seconds
