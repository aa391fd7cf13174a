"""The nouns that every part shares: samples, responses, groups, and one model's encoded view of them.

Shapes in names: B sequences, T tokens of a padded sequence, N rows that predict response tokens, R responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

TaskName = Literal["instruction", "code", "math", "vqa", "caption"]
Role = Literal["teacher", "student", "reference", "judge"]
Layout = Literal["joint", "separate"]
FinishReason = Literal["stop", "length", "filtered"]  # filtered: withheld or cut by a server's content filter


@dataclass(frozen=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image in a message, by reference: a path, a data URL or a key that the data source resolves."""

    image: str


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True)
class Sample:
    """One prompt: the chat up to the turn that a model is to write.

    `id` is unique within a run, also for prompts with the same text. `reference` is the data set's own
    answer, `rejected` one that it calls worse. `source` says where the row came from ("prompts.jsonl:12"),
    for messages.
    """

    id: str
    messages: tuple[Message, ...]
    task: TaskName = "instruction"
    reference: str | None = None
    source: str = ""
    rejected: str | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """References of all images, in order."""
        return tuple(p.image for m in self.messages for p in m.parts if isinstance(p, ImagePart))


@dataclass(frozen=True)
class Usage:
    """What one response cost, as the engine that made it reports it; None where it does not say."""

    prompt_tokens: int | None
    response_tokens: int | None  # a server counts hidden reasoning too
    seconds: float  # of the attempt that succeeded
    attempts: int = 1


@dataclass(frozen=True)
class Response:
    """One answer to a sample, as token ids of the vocabulary that teacher and student share.

    `token_ids` ends with an end-of-turn token only where the model produced one (`finish_reason == "stop"`).
    They are empty where an engine without token ids was given no tokenizer. `fingerprint` identifies what
    made it: model, adapter and sampling. Two responses are equal whatever they cost.
    """

    sample_id: str
    role: Role
    round: int
    draw: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    fingerprint: str
    usage: Usage | None = field(default=None, compare=False)


class Group(NamedTuple):
    """A sample with its responses: two in a pair, one in evaluation."""

    sample: Sample
    responses: tuple[Response, ...]


class Encoded(NamedTuple):
    """One model's view of a micro-batch. Responses are numbered in group order."""

    inputs: Mapping[str, Tensor]  # forward arguments of this model, e.g. input_ids (B, T)
    rows_N: Tensor  # indices into the flattened (B * T) positions that predict response tokens
    target_ids_N: Tensor  # the token that each row predicts
    response_N: Tensor  # which response each row belongs to, non-decreasing


class Request(NamedTuple):
    """A response to be made."""

    sample: Sample
    role: Role
    round: int
    draw: int = 0


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy; `top_k == 0` and `top_p == 1` are off."""

    max_new_tokens: int
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0
