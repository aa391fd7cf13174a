"""What is said in a chat, and where do its images stand? Turns of several spellings to messages.

A turn is {role, content} or, as ShareGPT and LLaVA write it, {from, value}. Content is text or a list of
parts: {type: text, text}, {type: image, image}, {type: image_url, image_url: {url}}. {type: image} alone and
the mark <image> in text stand for the next image of the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from shared.errors import unknown_name
from shared.types import ImagePart, Message, Part, TextPart

MARK = "<image>"
_MARK = re.compile(r"\n?<image>\n?")  # LLaVA sets a mark on its own line; templates bring their own breaks
_PENDING = ImagePart("")  # to be filled with the row's next image

Role = Literal["system", "user", "assistant"]
Find = Callable[[object], str]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class BadRowError(Exception):
    """What is wrong with one row."""


def parse_chat(chat: object, column: str, find: Find) -> list[Message]:
    """The turns of a column; images that are only marked wait for `place_images`.

    Args:
        chat: A list of turns.
        column: Its name, for messages.
        find: The reference of an image's value.

    Raises:
        BadRowError: turn and cause.
    """
    if not isinstance(chat, list) or not chat:
        raise BadRowError(f"{column} must be a list of turns, got {shown(chat)}")
    return [_parse_turn(turn, f"{column}[{index}]", find) for index, turn in enumerate(chat)]


def place_images(messages: Sequence[Message], references: Sequence[str]) -> list[Message]:
    """Put the row's images, in order, where the chat marks them.

    Raises:
        BadRowError: more or fewer marks than images.
    """
    placed = [Message(message.role, tuple(_with_marks(message.parts))) for message in messages]
    marks = sum(part is _PENDING for message in placed for part in message.parts)
    if marks != len(references):
        raise BadRowError(
            f"{marks} image mark(s) ({MARK}) in the text, and {len(references)} image(s) in the row"
        )
    waiting = iter(references)
    return [
        Message(
            message.role,
            tuple(ImagePart(next(waiting)) if part is _PENDING else part for part in message.parts),
        )
        for message in placed
    ]


def is_marked(messages: Sequence[Message], *, in_text: bool) -> bool:
    """Whether an image waits for its place: for a part of the chat, or also for a mark in its text."""
    return any(
        part is _PENDING or (in_text and isinstance(part, TextPart) and MARK in part.text)
        for message in messages
        for part in message.parts
    )


def exchanges(
    messages: Sequence[Message], turns: Literal["last", "all"]
) -> list[tuple[tuple[Message, ...], str | None]]:
    """Prompts with their reference answers: up to the last user turn, or up to each of them."""
    ends = [index for index, message in enumerate(messages) if message.role == "user"]
    if turns == "last":
        ends = ends[-1:]
    found: list[tuple[tuple[Message, ...], str | None]] = []
    for end in ends:
        answer = messages[end + 1] if end + 1 < len(messages) else None
        given = answer.text if answer is not None and answer.role == "assistant" else None
        found.append((tuple(messages[: end + 1]), given or None))
    return found


def answer_text(value: object, column: str) -> str | None:
    """An answer as text, as a turn, or as a chat that ends with it."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        message = _parse_turn(value, column, _no_image)
        if message.role != "assistant":
            raise BadRowError(f"{column} must end with the assistant's turn, got the {message.role}'s")
        return message.text or None
    if value is not None and not isinstance(value, str):
        raise BadRowError(f"{column} must be text, got {shown(value)}")
    return value or None


def shown(value: object) -> str:
    """A value for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _parse_turn(turn: object, place: str, find: Find) -> Message:
    match turn:
        case {"role": role, "content": content} if role is not None:
            pass
        case {"from": role, "value": content}:
            pass
        case _:
            raise BadRowError(f"{place} must be {{role, content}} or {{from, value}}, got {shown(turn)}")
    if role not in _ROLES:
        raise BadRowError(f"{place}: {unknown_name('role', str(role), _ROLES)}")
    if isinstance(content, str):
        return Message(_ROLES[role], (TextPart(content),))
    if not isinstance(content, list):
        raise BadRowError(f"{place}: content must be text or a list of parts, got {shown(content)}")
    parts = tuple(_parse_part(part, f"{place}.content[{i}]", find) for i, part in enumerate(content))
    return Message(_ROLES[role], parts)


def _parse_part(part: object, place: str, find: Find) -> Part:
    match part:
        case {"type": "text", "text": str(text)}:
            return TextPart(text)
        case {"type": "image", "image": image} if image is not None:
            return ImagePart(find(image))
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return ImagePart(find(url))
        case {"type": "image"}:
            return _PENDING
    raise BadRowError(f"{place} must be {{type: text, text}} or {{type: image, image}}, got {shown(part)}")


def _with_marks(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        if not isinstance(part, TextPart) or MARK not in part.text:
            yield part
            continue
        for index, piece in enumerate(_MARK.split(part.text)):
            if index:
                yield _PENDING
            if piece:
                yield TextPart(piece)


def _no_image(value: object) -> str:
    raise BadRowError(f"an answer cannot hold an image, got {shown(value)}")
