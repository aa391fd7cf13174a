"""What is a task? Data, a prompt, sampling and a scorer, with what a reader must know of its metrics.

The nouns here are all that a task of your own needs: `Row` in, `Question` out, `Reply` in, `Scored` out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from eval.scores import Metric
from shared.errors import UserError, nearest
from shared.types import FinishReason, ImagePart, Message, Part, Sample, Sampling, TaskName, TextPart

if TYPE_CHECKING:
    from eval.models import Opened
    from eval.settings import TaskSettings
    from shared.progress import Speaker


class RowError(UserError):
    """A row of a data set that a task cannot use; the reader adds file and row."""


class Row(Mapping[str, Any]):
    """One row of a data set, with readers that say what is missing.

    Args:
        values: The columns.
        number: The row's place in its data, from 0.
        image: Makes a local file out of an image column's value.
    """

    def __init__(
        self, values: Mapping[str, Any], number: int, image: Callable[[object], str] | None = None
    ) -> None:
        self._values = values
        self._image = image
        self.number = number

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def first(self, *names: str) -> Any:
        """The first of these columns that the row has and that is not null.

        Raises:
            RowError: none of them.
        """
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        guess = nearest(names[0], self._values)
        hint = f" (is it {guess!r}?)" if guess else ""
        raise RowError(f"needs a column {' or '.join(names)}; has {', '.join(self._values) or 'none'}{hint}")

    def text(self, *names: str) -> str:
        """The same, as text."""
        value = self.first(*names)
        if not isinstance(value, str):
            raise RowError(f"{' or '.join(names)} must be text; got {value!r}")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts, or one text for a list of one. Rows {"answer": text} count as the text."""
        value = self.first(*names)
        items = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
        given = [item.get("answer") if isinstance(item, Mapping) else item for item in items]
        texts = tuple(item for item in given if isinstance(item, str))
        if not texts or len(texts) < len(given):
            raise RowError(f"{' or '.join(names)} must be a text or a list of texts; got {value!r}")
        return texts

    def id(self, *names: str) -> str:
        """The row's name, or its number where it has none of these columns."""
        given = next((self._values[name] for name in names if self._values.get(name) is not None), None)
        return str(self.number if given is None else given)

    def image(self, *names: str) -> ImagePart:
        """An image column (a path, or a file's bytes) as a part of a message."""
        return self.image_file(self.first(*names))

    def image_file(self, value: object) -> ImagePart:
        """An image by its path, which may start from the folder of images."""
        assert self._image is not None, "a row read without its data set has no images"
        return ImagePart(self._image(value))


@dataclass(frozen=True)
class Question:
    """One thing to ask. `data` is what the scorer needs of the row, JSON only, beside the references.

    `follow_ups` are further user turns, each asked after the reply to the one before.
    """

    id: str
    prompt: str
    references: tuple[str, ...] = ()
    images: tuple[ImagePart, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    follow_ups: tuple[str, ...] = ()

    def sample(self, family: TaskName, replies: Sequence[str] = ()) -> Sample:
        """The chat up to the turn that comes after these replies."""
        parts: tuple[Part, ...] = (*self.images, TextPart(self.prompt))
        messages = [Message("user", parts)]
        for reply, following in zip(replies, self.follow_ups, strict=False):
            messages += [
                Message("assistant", (TextPart(reply),)),
                Message("user", (TextPart(following),)),
            ]
        reference = self.references[0] if self.references else None
        return Sample(self.id, tuple(messages), family, reference, source=self.id)

    @property
    def turns(self) -> int:
        """How many replies it takes."""
        return 1 + len(self.follow_ups)


@dataclass(frozen=True)
class Reply:
    """What a model said to a question: one text a turn."""

    question: Question
    texts: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    draw: int = 0

    @property
    def text(self) -> str:
        """The last turn's."""
        return self.texts[-1]


class Scored(NamedTuple):
    """What was read in a reply, and what that is worth: a value for each column that the metrics use."""

    answer: str
    values: Mapping[str, float]
    note: str = ""


class Quotient(NamedTuple):
    """A metric that is no mean over samples: the sum of one column over that of another, as recall is.

    `higher_is_better` is None where neither direction is.
    """

    title: str
    above: str
    below: str
    higher_is_better: bool | None


class Hub(NamedTuple):
    """A data set on the Hugging Face hub: configurations of one split, or one file of the repository."""

    name: str
    split: str = ""
    configurations: tuple[str | None, ...] = (None,)
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        inside = self.file or ":".join(filter(None, (*self.configurations, self.split)))
        return f"{self.name} ({inside})" if inside else self.name


class Tools(Protocol):
    """What scoring may need beside the replies; each is made when it is first asked for."""

    @property
    def sandbox(self) -> Any:
        """Runs programs (`eval.sandbox.runner.Sandbox`)."""
        ...

    @property
    def clip_model(self) -> str | None:
        """The CLIP model that captions are scored with, if that was asked for."""
        ...


class Runner(Protocol):
    """A task that asks and scores in a way of its own, in place of `read` and `score`."""

    def check(self, settings: TaskSettings, *, starting: bool) -> None:
        """Refuse what cannot be used before a model is loaded; `starting`: with all that takes a while.

        Raises:
            UserError: settings without effect, data that cannot be had.
        """
        ...

    def run(
        self, settings: TaskSettings, opened: Opened, folder: Path, *, batch_tokens: int, speaker: Speaker
    ) -> dict[str, Any]:
        """Ask the model, score, and write `task.json`, `settings.json`, records and `scores.json`."""
        ...


Scorer = Callable[[Sequence[Reply], Tools], Iterable[Scored]]
Values = Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: As on the command line.
        version: A number; raise it whenever prompt, data reading or scoring change: scores of different
            versions are not compared.
        family: What kind of sample it is.
        summary: One line for `list`.
        data: Where the rows come from if no path is given: a hub data set or `pkg://PACKAGE/FILE`; None
            where only a local path serves.
        columns: What a row of a local file holds, in a line.
        source: Where people get that file, if it is on no hub.
        read: A row to a question; raises RowError.
        metrics: By column; the first one is the headline.
        score: All replies at hand to what they are worth, in order.
        sampling: How replies are drawn unless a run says otherwise.
        quotients: Metrics that are no means.
        per_question: All draws' values of one question to the question's own, as pass@k needs; None: every
            draw counts by itself.
        images: Whether questions have images.
        runs_code: Whether scoring runs what the model wrote.
        judged: Whether a judge can grade the replies.
        runner: Asks and scores by itself, where `read` and `score` do not do.
    """

    name: str
    version: int | str
    family: TaskName
    summary: str
    data: Hub | str | None
    columns: str
    read: Callable[[Row], Question]
    metrics: Mapping[str, Metric]
    score: Scorer
    sampling: Sampling
    quotients: Mapping[str, Quotient] = field(default_factory=dict)
    per_question: Callable[[Sequence[Values]], Values] | None = None
    images: bool = False
    runs_code: bool = False
    judged: bool = False
    runner: Runner | None = None
    source: str = ""


def each(score: Callable[[Reply], Scored]) -> Scorer:
    """A scorer out of one for a single reply."""
    return lambda replies, tools: map(score, replies)
