"""What does a run hold open? Its prompts and models, and the engines that sample from them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from shared.adapter import Adapter, AdapterKind
from shared.config import RunConfig
from shared.data.prompts import split_by_length
from shared.data.run_prompts import RunPrompts, load_run_prompts
from shared.generation.collect import collect_responses
from shared.generation.transformers_engine import TransformersEngine
from shared.models.pair_attention import require_gpu
from shared.models.students import merged, trainable_parameters
from shared.objectives.objective import Objective
from shared.progress import Speaker
from shared.prompt_writing import write_prompts_of
from shared.training.checkpoints import find_checkpoints, load_weights
from shared.training.layout import Layouts, choose_layouts
from shared.training.loop import Trainee
from shared.training.setup import Models, make_trainee, open_models, prune_start
from shared.types import Request, Response, Role, Sample, Sampling
from shared.workspace import Workspace


@dataclass(frozen=True)
class Session:
    """A run in memory. The trainee's weights change; all else stays."""

    config: RunConfig
    workspace: Workspace
    speaker: Speaker
    accelerator: Accelerator
    objective: Objective
    train_samples: Sequence[Sample]
    heldout_samples: Sequence[Sample]
    models: Models
    trainee: Trainee

    def legs(self, round_number: int) -> list[list[Sample]]:
        """What of a round is sampled at a time: all, or the prompts of `generation.refresh` steps."""
        refresh = self.config.generation.refresh
        if refresh is None:
            return [list(self.train_samples)]
        # the next steps' prompts are drawn from all, so that the order of files does not become a curriculum
        key = f"{self.config.seed}\0{round_number}\0"
        shuffled = sorted(self.train_samples, key=lambda s: hashlib.sha256(f"{key}{s.id}".encode()).digest())
        size = max(1, refresh * self.config.training.pairs_per_step // self.config.generation.draws)
        return [shuffled[first : first + size] for first in range(0, len(shuffled), size)]

    def engine(self, model: PreTrainedModel, adapter: Adapter, fingerprint: str) -> TransformersEngine:
        """An engine that never samples a token which only one of the two models has."""
        vocabulary = self.models.vocabulary
        return TransformersEngine(
            model,
            adapter,
            fingerprint=fingerprint,
            width=vocabulary.width,
            excluded_ids=vocabulary.excluded_ids,
        )

    def student_engine(self, fingerprint: str) -> TransformersEngine:
        """The student as it is now, as one plain model in the number format that it is trained in."""
        model = in_dtype(merged(self.trainee.student), sampling_dtype(self.config))
        return self.engine(model, self.models.student_adapter, fingerprint)

    def teacher_engine(self) -> TransformersEngine:
        """The teacher."""
        models = self.models
        assert models.teacher is not None
        return self.engine(models.teacher, models.teacher_adapter, models.teacher_fingerprint)

    def start_model(self) -> PreTrainedModel:
        """The student before its first step, from the checkpoint that every run keeps."""
        student = copy.deepcopy(self.trainee.student)
        load_weights(find_checkpoints(self.workspace.folder)[0], student)
        return in_dtype(merged(student), sampling_dtype(self.config))

    def sampling(self) -> Sampling:
        """How training responses are drawn."""
        generation = self.config.generation
        return Sampling(
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            seed=self.config.seed,
        )

    def greedy(self) -> Sampling:
        """The same length limit, the most likely token each time."""
        return Sampling(max_new_tokens=self.config.generation.max_new_tokens, temperature=0.0)

    def collect(
        self,
        engine: TransformersEngine,
        role: Role,
        samples: Sequence[Sample],
        folder: Path,
        *,
        sampling: Sampling,
        round_number: int = 0,
        what: str = "",
        alone: bool = False,
        draws: int = 1,
    ) -> list[Response]:
        """Responses to all samples, out of the store in `folder` as far as it has them.

        In a sweep, what another run was answered by the same model to the same questions is copied.
        All processes share the work, unless this one is `alone` in calling.
        """
        adapter = self.models.teacher_adapter if role == "teacher" else self.models.student_adapter
        what = what or f"{role}'s responses"
        with self.speaker.bar(what) as bar:
            responses = collect_responses(
                engine,
                [Request(sample, role, round_number, draw) for sample in samples for draw in range(draws)],
                sampling,
                folder=folder,
                prompt_tokens=adapter.prompt_tokens,
                batch_tokens=self.config.generation.batch_tokens,
                progress=lambda p: bar(p.batches_done, p.batches_total, p.speed),
                beside=self.workspace.beside(folder),
                adopted=lambda source: self.speaker.say(f"  {what}: taken from {source}"),
                process=0 if alone else self.accelerator.process_index,
                processes=1 if alone else self.accelerator.num_processes,
                barrier=(lambda: None) if alone else self.accelerator.wait_for_everyone,
            )
        cut = sum(response.finish_reason == "length" for response in responses)
        tokens = sum(len(response.token_ids) for response in responses)
        self.speaker.say(f"  {what}: {len(responses)}, {tokens} tokens, {cut} cut by the length limit")
        return responses


def sampling_dtype(config: RunConfig) -> torch.dtype:
    """The number format in which the student samples: that of its forward pass in training."""
    return (
        torch.bfloat16 if config.training.mixed_precision == "bf16" else getattr(torch, config.student.dtype)
    )


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself where it has that number format, else a converted copy."""
    if model.dtype == dtype:
        return model
    converted: Any = copy.deepcopy(model)
    return converted.to(dtype)  # type: ignore[no-any-return]


def open_session(
    config: RunConfig,
    kind: AdapterKind,
    objective: Objective,
    *,
    workspace: Workspace,
    speaker: Speaker,
    accelerator: Accelerator,
) -> Session:
    """Read the prompts, load the models, make the student's start.

    Raises:
        UserError: whatever in prompts, models or their combination cannot be used.
    """
    if config.training.pair_attention == "flex":  # before anything is loaded or written
        require_gpu(accelerator.device)
    prompts = None
    if not config.prompts.written:  # what is wrong with files is known before models are loaded
        prompts = _read_prompts(config, objective, workspace, speaker)
    speaker.stage(f"Loading {(config.teacher or config.student).model.name}")
    with workspace.timed("load"):
        models = open_models(config, kind, accelerator.device)
    if prompts is None:
        with workspace.timed("generate"):
            write_prompts_of(config, models, workspace=workspace, speaker=speaker, accelerator=accelerator)
        prompts = _read_prompts(config, objective, workspace, speaker)
    train, heldout = prompts.train, prompts.heldout
    with workspace.timed("load"):
        train = _fitting(train, models, config, speaker)
        heldout = _fitting(heldout, models, config, speaker)
        prune = config.student.prune
        calibration = train[: prune.calibration_prompts if prune else 1]
        recipe = workspace.read_json("student.json") or {}
        prune_start(config, models, calibration, recipe.get("kept_layers"))
        if models.kept_layers is not None:  # a resumed run must not choose anew
            workspace.write_json("student.json", {"kept_layers": models.kept_layers})
        layouts = Layouts()
        if len(objective.sides) > 1:
            layouts = choose_layouts(
                config.training.pair_layout,
                models,
                train,
                response_tokens=config.generation.max_new_tokens,
                teacher_cached=config.teacher is not None and config.teacher.cache is not None,
                attention=config.training.pair_attention,
            )
    tasks = sorted({sample.task for sample in (*train, *heldout)})
    objective = config.objective.build(tasks)
    steps_per_round = -(-len(train) * config.generation.draws // config.training.pairs_per_step)
    trainee = make_trainee(
        config,
        kind,
        models,
        accelerator,
        objective,
        samples=train,
        tasks=tasks,
        total_steps=steps_per_round * config.training.rounds,
        layouts=layouts,
    )
    _introduce(config, objective, models, trainee, train, heldout, speaker)
    return Session(
        config, workspace, speaker, accelerator, objective, train, heldout, models, trainee
    )  # fmt: skip


def _read_prompts(
    config: RunConfig, objective: Objective, workspace: Workspace, speaker: Speaker
) -> RunPrompts:
    prompts = load_run_prompts(config.prompts, objective, seed=config.seed, folder=workspace.folder)
    for note in prompts.notes:
        speaker.say(f"  {note}")
    return prompts


def _fitting(samples: Sequence[Sample], models: Models, config: RunConfig, speaker: Speaker) -> list[Sample]:
    """The prompts that fit both models' contexts with a response behind them: none is ever truncated."""
    kept = list(samples)
    assert models.start is not None
    for adapter, model in (
        (models.teacher_adapter, models.teacher),
        (models.student_adapter, models.start),
    ):
        if model is None:
            continue
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if context is None:
            continue
        split = split_by_length(
            kept,
            adapter.prompt_tokens,
            max_prompt_tokens=context - config.generation.max_new_tokens,
            on_over=config.prompts.over_length,
        )
        kept = list(split.kept)
        if split.dropped:
            names = ", ".join(sample.id for sample, _ in split.dropped[:5])
            speaker.say(f"  left out {len(split.dropped)} prompts that do not fit the context: {names}")
    return kept


def _introduce(
    config: RunConfig,
    objective: Objective,
    models: Models,
    trainee: Trainee,
    train: Sequence[Sample],
    heldout: Sequence[Sample],
    speaker: Speaker,
) -> None:
    student = trainable_parameters(trainee.student)
    taught_by = ""
    if models.teacher is not None:
        taught_by = f"teacher {trainable_parameters(models.teacher).total / 1e6:.1f} M parameters, "
    if models.kept_layers is not None:
        speaker.say(f"  pruned to the blocks {', '.join(map(str, models.kept_layers))}")
    speaker.say(
        f"  {taught_by}student {student.total / 1e6:.1f} M parameters, "
        f"{student.trainable / 1e6:.1f} M of them trained ({config.student.how})"
    )
    speaker.say(
        f"  {len(train)} prompts to train on, {len(heldout)} held out; objective {objective.name}, "
        f"{trainee.total_steps} steps in {config.training.rounds} rounds"
    )
    for note in trainee.layouts.notes:
        speaker.say(f"  {note}")
    if config.training.rounds == 1 and objective.uses_alpha_curriculum:
        speaker.say("  a single round measures gaps but has no alpha curriculum: alpha stays at its start")
