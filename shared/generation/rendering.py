"""How does a sample look to a chat server: messages as JSON, images as data URLs."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

from shared.data.images import UNLIMITED, ImageError, named, read_image
from shared.errors import UserError
from shared.types import ImagePart, Message, Sample, TextPart

# What the usual servers decode. https://developer.mozilla.org/docs/Web/Media/Guides/Formats/Image_types
_SIGNATURES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
_BYTES_PER_TOKEN = 3  # UTF-8; on the low side, so that estimates are on the high side
_TOKENS_PER_IMAGE = 1000


def render_messages(sample: Sample, *, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """The chat as the chat completions API takes it.

    A message of text alone is a string, which every server takes; one with images is a list of parts.

    Raises:
        UserError: an image that is not there or of a type that servers do not take; names the sample.
    """
    messages: Sequence[Message] = sample.messages
    if system_prompt is not None and messages[0].role != "system":
        messages = (Message("system", (TextPart(system_prompt),)), *messages)
    try:
        return [{"role": message.role, "content": _content(message)} for message in messages]
    except UserError as error:
        raise UserError(f"sample {sample.id!r} ({sample.source}): {error}") from None


def estimated_tokens(sample: Sample) -> int:
    """Roughly how long a prompt is where its tokenizer is elsewhere; good enough to plan batches."""
    text = sum(len(message.text.encode()) for message in sample.messages)
    return text // _BYTES_PER_TOKEN + _TOKENS_PER_IMAGE * len(sample.images) + 4 * len(sample.messages)


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return message.text
    return [
        {"type": "image_url", "image_url": {"url": _data_url(part.image)}}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.parts
    ]


def _data_url(reference: str) -> str:
    try:
        content = read_image(reference, UNLIMITED)
    except ImageError as error:
        raise UserError(f"image {named(reference)}: {error}") from None
    media_type = next((name for name, start in _SIGNATURES.items() if start.match(content)), None)
    if media_type is None:
        raise UserError(
            f"image {named(reference)} is of a type that chat servers do not take. Convert it to PNG, JPEG, "
            "GIF or WebP."
        )
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
