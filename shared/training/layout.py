"""Are pairs laid out with their prompt once or twice? Each model's own answer, measured before training.

Rows differ between the layouts but not their order, so that teacher and student need not agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from shared.adapter import Adapter
from shared.config import PairAttention, PairLayout
from shared.errors import UserError
from shared.models.heads import causal_lm_of
from shared.models.layout_support import TOLERANCES, joint_difference, joint_saves, joint_support
from shared.models.pair_attention import attend_in_blocks, flex_obstacle
from shared.types import Group, Layout, Response, Role, Sample

if TYPE_CHECKING:
    from shared.training.setup import Models

PROBED_ROLES: tuple[Role, Role] = ("teacher", "student")


class Layouts(NamedTuple):
    """How each model reads the groups of a run."""

    student: Layout = "separate"
    teacher: Layout = "separate"
    response_tokens: float = math.inf  # the longest response that this was decided for
    notes: tuple[str, ...] = ()  # why a model that could have shared the prompt does not


def choose_layouts(
    wanted: PairLayout,
    models: Models,
    samples: Sequence[Sample],
    *,
    response_tokens: int,
    teacher_cached: bool = False,
    attention: PairAttention = "dense",
) -> Layouts:
    """The layout of each model for the pairs of these prompts; with `flex`, the models are set to it.

    Args:
        wanted: `auto` takes `joint` where it pays and is known and measured to change nothing.
        models: with the student's start in place, before any wrapping.
        samples: the prompts that pairs are made of.
        response_tokens: the longest response there can be.
        teacher_cached: the teacher reads no pair in training.
        attention: of joint sequences.

    Raises:
        UserError: `joint` or `flex` was asked for, and a model cannot.
    """
    if wanted == "separate":
        return Layouts(response_tokens=response_tokens)
    assert models.start is not None and models.teacher is not None
    sides: tuple[tuple[str, nn.Module, Adapter], ...] = (
        ("student", models.start, models.student_adapter),
        ("teacher", models.teacher, models.teacher_adapter),
    )
    layouts: dict[str, Layout] = {"teacher": "separate"}
    notes = []
    for name, model, adapter in sides[:1] if teacher_cached else sides:
        if attention == "flex":
            _set_to_flex(name, causal_lm_of(model))
        obstacle = _obstacle(wanted, model, adapter, samples, response_tokens, attention)
        if obstacle is not None and wanted == "joint":
            raise UserError(
                f"training.pair_layout: joint is not possible with the {name} "
                f"({causal_lm_of(model).config.model_type}): {obstacle}. Set it to auto or separate."
            )
        layouts[name] = "joint" if obstacle is None else "separate"
        if obstacle is not None:
            notes.append(f"the {name} computes the prompt once for each response: {obstacle}")
    return Layouts(layouts["student"], layouts["teacher"], response_tokens, tuple(notes))


def _set_to_flex(name: str, causal_lm: Any) -> None:
    obstacle = flex_obstacle(causal_lm, trained=name == "student")
    if obstacle is not None:
        raise UserError(
            f"training.pair_attention: flex is not possible with the {name} "
            f"({causal_lm.config.model_type}): {obstacle}. Set it to dense."
        )
    attend_in_blocks(causal_lm)


def _obstacle(
    wanted: PairLayout,
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    response_tokens: int,
    attention: PairAttention,
) -> str | None:
    """Why this model must read responses in sequences of their own; None if it need not."""
    support = joint_support(model)
    by_length = sorted(samples, key=adapter.prompt_tokens)
    longest = adapter.prompt_tokens(by_length[-1]) + response_tokens
    typical = adapter.prompt_tokens(by_length[len(by_length) // 2])
    if (obstacle := support.obstacle_at(longest)) is not None:
        return obstacle
    if wanted == "auto" and not support.family_known:
        return "its family has not been compared in both layouts (pair_layout: joint measures it and goes on)"
    # flex attention computes no hidden product, so that one sequence never has more of them than two
    costs = attention == "dense" and not joint_saves(
        model, prompt_tokens=typical, response_tokens=response_tokens
    )
    if wanted == "auto" and costs:
        return (
            f"a prompt of {typical} tokens saves less than attention over two responses of up to "
            f"{response_tokens} in one sequence costs"
        )
    # the longest prompt with the longest response, and a short one for padding: all lengths that there can be
    probes = [made_up_group(sample, adapter, response_tokens) for sample in (by_length[-1], by_length[0])]
    difference = joint_difference(model, adapter, probes)
    allowed = TOLERANCES[causal_lm_of(model).dtype]
    if not difference <= allowed:  # also true for NaN
        return f"its hidden states differ by {difference:.1g} between the layouts (allowed {allowed:g})"
    return None


def made_up_group(
    sample: Sample, adapter: Adapter, response_tokens: int, roles: Sequence[Role] = PROBED_ROLES
) -> Group:
    """A prompt with made-up responses, of full and of half length, out of the prompt's own words."""
    text = " ".join(message.text for message in sample.messages) or sample.id
    words = adapter.encode_text(text, stop=False)
    long = (words * (response_tokens // len(words) + 1))[:response_tokens]
    short = long[::-1][: max(1, response_tokens // 2)]
    responses = (
        Response(sample.id, role, 0, 0, ids, "", "length", "")
        for role, ids in zip(roles, (long, short), strict=False)
    )
    return Group(sample, tuple(responses))
