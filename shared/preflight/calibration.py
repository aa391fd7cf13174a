"""How long will a run take here? A few micro-batches of sampling and training, measured, then multiplied."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shared.data.layouts import footprint
from shared.generation.plan import plan_batches
from shared.generation.transformers_engine import TransformersEngine
from shared.session import Session
from shared.training.layout import made_up_group
from shared.training.loop import train_round
from shared.types import Group, Request, Role, Sample

MEASURED_TOKENS = 8  # decoded in a batch
MICRO_BATCHES = 2  # of a measured optimiser step


class Sampled(NamedTuple):
    """What one model's sampling takes."""

    batch_rows: int
    reading_s: float  # the prompts of one batch, and a first token
    token_s: float  # one more token of each response in the batch
    round_s: float  # all prompts of a round, if every response is as long as it may be


class Trained(NamedTuple):
    """What training takes."""

    tokens_per_second: float  # each response counted with its prompt
    round_s: float


def measure_sampling(session: Session, role: Role, answers: int) -> Sampled:
    """Time the middle batch of the plan.

    Args:
        session: open.
        role: who answers.
        answers: of a round, all draws counted.
    """
    models, generation = session.models, session.config.generation
    teacher = role == "teacher"
    engine = session.teacher_engine() if teacher else session.student_engine("measured")
    adapter = models.teacher_adapter if teacher else models.student_adapter
    requests = [Request(sample, role, 0) for sample in session.train_samples]
    batches = plan_batches(
        requests,
        [adapter.prompt_tokens(sample) for sample in session.train_samples],
        batch_tokens=generation.batch_tokens,
        max_new_tokens=generation.max_new_tokens,
    )
    batch = [requests[index] for index in batches[len(batches) // 2]]
    _generate(session, engine, batch, 1)  # kernels are chosen and caches filled at the first use
    reading_s, _ = _generate(session, engine, batch, 1)
    longer_s, steps = _generate(session, engine, batch, 1 + min(MEASURED_TOKENS, generation.max_new_tokens))
    token_s = max(0.0, longer_s - reading_s) / max(1, steps - 1)
    batches_of_round = len(batches) * answers / len(requests)
    round_s = batches_of_round * (reading_s + (generation.max_new_tokens - 1) * token_s)
    return Sampled(len(batch), reading_s, token_s, round_s)


def measure_training(session: Session, answers: int) -> Trained:
    """Time the second of two optimiser steps of a few micro-batches; the trainee is not used after it.

    Args:
        session: open.
        answers: pairs of a round.
    """
    trainee, response_tokens = session.trainee, session.config.generation.max_new_tokens
    adapter, sides = trainee.student_adapter, session.objective.sides
    groups = [
        made_up_group(sample, adapter, response_tokens, sides)
        for sample in _middle(
            session.train_samples, adapter.prompt_tokens, session.config.training.pairs_per_step
        )
    ]
    lengths = [
        (adapter.prompt_tokens(group.sample), [len(response.token_ids) for response in group.responses])
        for group in groups
    ]
    budget, taken = MICRO_BATCHES * trainee.config.micro_batch_tokens, 0
    chosen: list[Group] = []
    for group, (prompt, responses) in zip(groups, lengths, strict=True):
        taken += footprint(prompt, responses, trainee.layouts.student).tokens
        if chosen and taken > budget:
            break
        chosen.append(group)
    small = dataclasses.replace(
        trainee, config=trainee.config.model_copy(update={"pairs_per_step": len(chosen)})
    )
    speeds: list[float] = []
    curriculum = logging.getLogger("shared.objectives.curriculum")
    was_disabled, curriculum.disabled = curriculum.disabled, True  # gaps of made-up answers mean nothing
    try:
        for _ in range(2):
            train_round(
                small,
                chosen,
                first_step=small.step,
                seed=0,
                on_step=lambda metrics: speeds.append(metrics["train/tokens_per_second"]),
                on_checkpoint=lambda: None,
                on_evaluate=lambda: None,
            )
            small.alpha.end_round()  # later rounds may look at every response's own gap
    finally:
        curriculum.disabled = was_disabled
    per_pair = statistics.fmean(
        footprint(prompt, responses, "separate").tokens for prompt, responses in lengths
    )
    return Trained(speeds[-1], answers * per_pair / speeds[-1])


def _generate(
    session: Session, engine: TransformersEngine, batch: Sequence[Request], tokens: int
) -> tuple[float, int]:
    sampling = dataclasses.replace(session.sampling(), max_new_tokens=tokens)
    began = time.perf_counter()
    responses = list(engine.generate(batch, sampling))
    return time.perf_counter() - began, max(len(response.token_ids) for response in responses)


def _middle(samples: Sequence[Sample], length: Callable[[Sample], int], count: int) -> list[Sample]:
    by_length = sorted(samples, key=length)
    start = max(0, (len(by_length) - count) // 2)
    return list(by_length[start : start + count])
