"""Do the rows of both models predict the same tokens? Checks it, and says which response each row belongs to.

Shapes: B sequences, T tokens of a padded sequence, N rows that predict response tokens, R responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch

from shared.data.layouts import PADDING
from shared.errors import AlignmentError
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.core import ResponseRows
from shared.objectives.objective import SIDES
from shared.types import Encoded, Group, Response


def response_rows(groups: Sequence[Group], encoded: Encoded, tasks: Sequence[str]) -> ResponseRows:
    """Side, pair and curriculum cell (side x task) of every response of a micro-batch, in group order."""
    sides, pairs, cells = [], [], []
    for index, group in enumerate(groups):
        for response in group.responses:
            side = SIDES.index(response.role)
            sides.append(side)
            pairs.append(index)
            cells.append(side * len(tasks) + tasks.index(group.sample.task))
    return ResponseRows(
        targets_N=encoded.target_ids_N,
        response_N=encoded.response_N,
        side_R=torch.tensor(sides, dtype=torch.long),
        pair_R=torch.tensor(pairs, dtype=torch.long),
        cell_R=torch.tensor(cells, dtype=torch.long),
    )


def check_alignment(
    groups: Sequence[Group], encodings: Mapping[str, Encoded], vocabulary: SharedVocabulary
) -> None:
    """Every model's rows must predict exactly the responses' tokens, at the positions that hold them.

    Args:
        groups: the micro-batch.
        encodings: by the name of the model that each is for ("teacher", "student"); in either layout.
        vocabulary: the ids that both models share.

    Raises:
        AlignmentError: naming model, sample and cause.
    """
    for group in groups:
        for response in group.responses:
            foreign = [token for token in response.token_ids if token not in vocabulary]
            if foreign:
                raise AlignmentError(
                    f"sample {group.sample.id!r}, {response.role}'s response: token id {foreign[0]} is not "
                    "in the vocabulary that teacher and student share (image placeholders, padding and "
                    "unequal tokens are left out). Sample the responses again with these two models."
                )
    for model, encoded in encodings.items():
        _check_counts(groups, model, encoded)
        _check_places(groups, model, encoded)


def check_prompts(groups: Sequence[Group], encoded: Encoded, prompts: Sequence[Sequence[int]]) -> None:
    """Every sequence must begin with its own group's prompt.

    Args:
        groups: the micro-batch.
        encoded: as one model sees it, in either layout.
        prompts: each group's prompt, in the tokens of that model.

    Raises:
        AlignmentError: naming the sample.
    """
    ids = encoded.inputs["input_ids"].tolist()
    joint = len(ids) == len(groups)
    owners = [i for i, group in enumerate(groups) for _ in (group.responses if not joint else (0,))]
    for row, owner in zip(ids, owners, strict=True):
        if row[: len(prompts[owner])] != list(prompts[owner]):
            raise AlignmentError(
                f"sample {groups[owner].sample.id!r}: its sequence does not begin with its own prompt, as "
                "this model reads it. Samples or models were mixed up, so the run stops."
            )


class _Place(NamedTuple):
    """Where a response stands in a model's sequences, if its first row is right."""

    group: Group
    response: Response
    sequence: int
    prompt_end: int  # the position that predicts the first token: both responses' in a joint sequence
    start: int
    ends_sequence: bool


def _check_counts(groups: Sequence[Group], model: str, encoded: Encoded) -> None:
    responses = [(group, response) for group in groups for response in group.responses]
    counts = Counter(encoded.response_N.tolist())
    for index, (group, response) in enumerate(responses):
        if counts[index] != len(response.token_ids):
            _fail(
                group,
                response,
                model,
                f"there are {counts[index]} rows for {len(response.token_ids)} tokens. "
                "Was the prompt or the response truncated?",
            )
    sequences = len(encoded.inputs["input_ids"])
    if sequences not in (len(groups), len(responses)):
        _fail(*responses[0], model, f"there are {sequences} sequences for {len(responses)} responses")
    owners = [index for index, (_, response) in enumerate(responses) for _ in response.token_ids]
    if encoded.response_N.tolist() != owners:
        _fail(*responses[0], model, "the rows of this micro-batch are not in the order of its responses")


def _check_places(groups: Sequence[Group], model: str, encoded: Encoded) -> None:
    ids = encoded.inputs["input_ids"].tolist()
    rows, targets = encoded.rows_N.tolist(), encoded.target_ids_N.tolist()
    segments, mask = encoded.inputs.get("segment_ids"), encoded.inputs.get("attention_mask")
    filled = mask if segments is None else segments != PADDING
    ends = None if filled is None else filled.sum(-1).tolist()
    width, first = len(ids[0]), 0
    for place in _places(groups, rows, sequences=len(ids), width=width):
        group, response, sequence, prompt_end, start, ends_sequence = place
        tokens = list(response.token_ids)
        these = slice(first, first + len(tokens))
        first, stop = these.stop, start + len(tokens)
        if targets[these] != tokens:
            _fail(group, response, model, "its rows predict other tokens than the response's")
        if not 0 <= prompt_end < width:
            _fail(group, response, model, "its rows lie in another response's sequence")
        expected = [prompt_end, *range(start, stop - 1)]
        if rows[these] != [sequence * width + position for position in expected]:
            _fail(group, response, model, "its rows do not follow the response's tokens one by one")
        if ids[sequence][start:stop] != tokens or (ends_sequence and ends and ends[sequence] != stop):
            _fail(group, response, model, "its rows are shifted against the response's tokens")


def _places(groups: Sequence[Group], rows: Sequence[int], *, sequences: int, width: int) -> Iterator[_Place]:
    """Every response's place, by its first row and the lengths of the responses before it in its sequence."""
    joint = sequences == len(groups)
    sequence, first, prompt_end, start = -1, 0, 0, 0
    for group in groups:
        last = len(group.responses) - 1
        for number, response in enumerate(group.responses):
            if not joint or number == 0:
                sequence += 1
                prompt_end = rows[first] - sequence * width
                start = prompt_end + 1
            yield _Place(group, response, sequence, prompt_end, start, not joint or number == last)
            start += len(response.token_ids)
            first += len(response.token_ids)


def _fail(group: Group, response: Response, model: str, cause: str) -> NoReturn:
    raise AlignmentError(
        f"sample {group.sample.id!r}, {response.role}'s response: in the {model}'s batch, {cause}. "
        "The rows of teacher and student would not correspond, so the run stops."
    )
