"""What does a row of a prompt source say: its chat, its images, its task, its answers.

A row holds one of

- `messages` or `conversations`: a chat; an assistant turn at its end is the reference answer;
- `prompt` or `question`: the user's text, or a chat as above;
- `instruction`, and an optional `input` that follows it after an empty line;
- `chosen`: a whole chat,

looked for in this order, and optionally `image` or `images`, `id` (unique over all sources), `task`,
`system`, the reference answer as `reference`, `output`, `answer` or `chosen`, and a worse one as `rejected`.
Other columns are ignored; null counts as absent. A row that is a list has the columns 0, 1, 2, ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

from shared.config_data import PromptSource
from shared.data.conversations import (
    BadRowError,
    Find,
    answer_text,
    exchanges,
    is_marked,
    parse_chat,
    place_images,
    shown,
)
from shared.data.images import ImageError
from shared.errors import unknown_name
from shared.types import ImagePart, Message, Sample, TaskName, TextPart

_CHATS = ("messages", "conversations", "prompt", "question")
_ANSWERS = ("reference", "output", "answer", "chosen")
_TASKS: tuple[str, ...] = get_args(TaskName)


class Asked(NamedTuple):
    """A row's chat, before its images are placed."""

    messages: list[Message]
    plain: bool  # one text, for which a template or an image in front is meant


def parse_row(row: object, source: PromptSource, *, place: str, find: Find) -> list[Sample]:
    """The samples out of a decoded row, or of a line of JSON as bytes: one, or one for each turn.

    Args:
        row: What the source holds.
        source: How its rows are to be read.
        place: "FILE:ROW", the sample's source, and its id where the row's own is not to be used.
        find: The reference of an image's value.

    Raises:
        BadRowError: with what is wrong.
    """
    try:
        values = _columns(row, source)
        asked = _parse_asked(values, find)
        messages = _with_images(asked, values, source, find)
    except ImageError as error:
        raise BadRowError(str(error)) from None
    messages = _with_system(messages, source.system or _text(values, "system"))
    _check_chat(messages)
    reference = _answer(values, *_ANSWERS)
    rejected = _answer(values, "rejected")
    task = values.get("task", source.task or "instruction")
    if task not in _TASKS:
        raise BadRowError(unknown_name("task", str(task), _TASKS))
    given = place if source.ids == "place" else values.get("id", place)
    if not isinstance(given, str | int) or given == "":
        raise BadRowError(f"id must be text or an integer, got {given!r}")
    found = exchanges(messages, source.turns)
    samples = []
    for number, (prompt, answer) in enumerate(found, start=1):
        last = number == len(found)
        samples.append(
            Sample(
                str(given) if source.turns == "last" else f"{given}#{number}",
                prompt,
                cast(TaskName, task),
                (last and reference) or answer,
                source=place,
                rejected=rejected if last else None,
            )
        )
    _check_prompts(samples)
    return samples


def _columns(row: object, source: PromptSource) -> dict[str, Any]:
    """The row's values under our names."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise BadRowError("not UTF-8 text") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRowError(f"not JSON: {error}") from None
    if isinstance(row, list) and source.columns:
        row = dict(enumerate(row))
    if not isinstance(row, Mapping):
        raise BadRowError(f"expected an object with columns, got {type(row).__name__}")
    values = {name: value for name, value in row.items() if value is not None}
    for ours, theirs in source.columns.items():
        if theirs not in row:
            raise BadRowError(f"no column {theirs!r}, which columns.{ours} names; has {_names(row)}")
    return values | {ours: values.get(theirs) for ours, theirs in source.columns.items()}


def _parse_asked(values: Mapping[str, Any], find: Find) -> Asked:
    for column in _CHATS:
        value = values.get(column)
        if value is None:
            continue
        if column in ("prompt", "question") and not isinstance(value, list):
            return Asked([_user(_text(values, column) or "")], plain=True)
        return Asked(parse_chat(value, column, find), plain=False)
    if values.get("instruction") is not None:
        texts = (_text(values, "instruction"), _text(values, "input"))
        return Asked([_user("\n\n".join(filter(None, texts)))], plain=True)
    if isinstance(values.get("chosen"), list):
        return Asked(parse_chat(values["chosen"], "chosen", find), plain=False)
    hint = f"; `columns` says which is which, as in {{prompt: {next(iter(values))}}}" if values else ""
    raise BadRowError(
        f"needs a column {', '.join((*_CHATS, 'instruction'))} or chosen; has {_names(values)}{hint}"
    )


def _with_images(asked: Asked, values: Mapping[str, Any], source: PromptSource, find: Find) -> list[Message]:
    """The chat with the row's images in their places: before a plain prompt that marks none."""
    messages = asked.messages
    if source.template is not None:
        if not asked.plain:
            raise BadRowError("is a chat, to which `template` does not apply; remove it from the source")
        messages = [_user(source.template.replace("{}", messages[0].text))]
    given = next((values[name] for name in ("image", "images") if values.get(name) is not None), None)
    if given is None:
        # text alone may speak of <image> without meaning one
        strict = source.image_root is not None or "conversations" in values
        return place_images(messages, ()) if is_marked(messages, in_text=strict) else messages
    references = [
        find(value if source.image_name is None else source.image_name.replace("{}", str(value)))
        for value in (given if isinstance(given, list | tuple) else [given])
    ]
    if asked.plain and not is_marked(messages, in_text=True):
        return [Message("user", (*map(ImagePart, references), *messages[0].parts))]
    return place_images(messages, references)


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0].role == "system":
        return messages
    return [Message("system", (TextPart(system),)), *messages]


def _check_chat(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise BadRowError("a system turn can only be the first")
    if "user" not in roles[-2:] or (roles[-1] != "user" and roles[-1] != "assistant"):
        raise BadRowError(
            "the last turn to answer must be the user's, got "
            + ("an assistant's turn alone" if roles == ["assistant"] else f"the {roles[-1]}'s")
        )


def _check_prompts(samples: Sequence[Sample]) -> None:
    for sample in samples:
        texts = [message.text for message in sample.messages]
        if not texts[-1].strip() and not any(
            isinstance(part, ImagePart) for part in sample.messages[-1].parts
        ):
            raise BadRowError("the prompt is empty")
        try:
            "".join((sample.id, sample.reference or "", sample.rejected or "", *texts)).encode()
        except UnicodeEncodeError:
            raise BadRowError("half a surrogate pair (\\ud800 to \\udfff alone) is no text") from None


def _answer(values: Mapping[str, Any], *names: str) -> str | None:
    """The first of these columns that says something."""
    for name in names:
        if name in values and (text := answer_text(values[name], name)):
            return text
    return None


def _user(text: str) -> Message:
    return Message("user", (TextPart(text),))


def _text(values: Mapping[str, Any], column: str) -> str | None:
    value = values.get(column)
    if value is not None and not isinstance(value, str):
        raise BadRowError(f"{column} must be text, got {shown(value)}")
    return value or None


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, values)) or "none"
