"""How do a prompt and its responses become the sequences of one forward pass?

`separate` gives every response a sequence of its own: [prompt | y_t] and [prompt | y_s]. `joint` lays a group
out as one, [prompt | y_t | y_s], so that the prompt (with its images) is computed once, forward and backward:
a mask, made of the segments on the model's device (`shared.models.pair_attention`), hides the responses from
each other, and each one's positions restart right after the prompt. A response's hidden rows are the same in
both, up to rounding, in the models that `shared.models.layout_support` lets in.

Shapes in names: B sequences, T tokens of a padded sequence, P tokens of a prompt, A position axes (three in
M-RoPE), N rows that predict response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.types import Encoded, Layout

PROMPT, PADDING = 0, -1  # segments; the responses of a sequence are 1, 2, ...


class Footprint(NamedTuple):
    """What a group takes in a layout, for planning micro-batches."""

    sequences: int
    longest: int  # tokens of its longest sequence
    tokens: int  # of all its sequences, without padding


def footprint(prompt_tokens: int, response_tokens: Sequence[int], layout: Layout) -> Footprint:
    """The sequences of one group and their lengths, in tokens."""
    if layout == "joint":
        whole = prompt_tokens + sum(response_tokens)
        return Footprint(1, whole, whole)
    lengths = [prompt_tokens + tokens for tokens in response_tokens]
    return Footprint(len(lengths), max(lengths), sum(lengths))


def lay_out(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    layout: Layout,
    pad_id: int,
    prompt_positions: Sequence[Tensor] | None = None,
) -> Encoded:
    """Right-padded sequences of prompts with their responses, and the rows that predict the responses.

    Groups of one response need no segments: both layouts are then the same.

    Args:
        prompts: token ids of each group's prompt; never empty, as its last token predicts first tokens.
        responses: for each group, the token ids of its responses; none empty.
        layout: one sequence a response, or one a group.
        pad_id: any id; padding is masked out.
        prompt_positions: for models with position axes, (A, P) for each prompt; by default 0 ... P-1.
            Responses continue on every axis from the prompt's highest position.

    Returns:
        `input_ids` (B, T); `position_ids` (B, T), or (A, B, T) where the prompts' were given;
        `attention_mask` (B, T), 1 at tokens, or, where responses share a sequence, `segment_ids` (B, T):
        `PROMPT`; 1, 2, ... for its responses; `PADDING`.
    """
    assert all(map(len, prompts)) and all(len(ids) for group in responses for ids in group)
    joint = layout == "joint" and any(len(group) > 1 for group in responses)
    sequences = list(_sequences(prompts, responses, joint=joint))
    longest = max(len(prompts[group]) + sum(map(len, parts)) for group, parts in sequences)
    axes = () if prompt_positions is None else (len(prompt_positions[0]),)
    input_ids_BT = torch.full((len(sequences), longest), pad_id)
    segment_BT = torch.full_like(input_ids_BT, PADDING)
    position_ids = torch.arange(longest).repeat(*axes, len(sequences), 1)  # (B, T) or (A, B, T)
    rows, targets, lengths = [], [], []
    for row, (group, parts) in enumerate(sequences):
        prompt = prompts[group]
        start = len(prompt)
        input_ids_BT[row, :start] = torch.as_tensor(prompt)
        segment_BT[row, :start] = PROMPT
        follows = start
        if prompt_positions is not None:
            position_ids[:, row, :start] = prompt_positions[group]
            follows = int(prompt_positions[group].max()) + 1
        for segment, ids in enumerate(parts, start=PROMPT + 1):
            stop = start + len(ids)
            input_ids_BT[row, start:stop] = torch.as_tensor(ids)
            segment_BT[row, start:stop] = segment
            position_ids[..., row, start:stop] = torch.arange(follows, follows + len(ids))
            # the last prompt token predicts the first response token, each response token the next
            predicting = torch.tensor([len(prompt) - 1, *range(start, stop - 1)])
            rows.append(row * longest + predicting)
            targets.append(torch.as_tensor(ids))
            lengths.append(len(ids))
            start = stop
    mask = {"segment_ids": segment_BT} if joint else {"attention_mask": (segment_BT != PADDING).long()}
    return Encoded(
        inputs={
            "input_ids": input_ids_BT,
            **mask,
            # explicit: what a model would derive by itself differs between versions and families
            "position_ids": position_ids,
        },
        rows_N=torch.cat(rows),
        target_ids_N=torch.cat(targets),
        response_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    )


def groups_of_sequences(responses: Sequence[Sequence[object]], layout: Layout) -> list[int]:
    """The group that each sequence belongs to, for what a prompt brings along, such as images."""
    return [group for group, parts in enumerate(responses) for _ in (parts if layout == "separate" else (0,))]


def _sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], *, joint: bool
) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    for group, parts in enumerate(responses):
        if joint:
            yield group, parts
        else:
            yield from ((group, (ids,)) for ids in parts)
