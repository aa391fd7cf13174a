"""What does an image look like: encoded bytes to RGB pixels, as a viewer would show them.

An image is named by a *reference*: the path of a local file, or a data URL (`image_references` makes them out
of what rows hold). Orientation tags are followed, transparency lies on white, 16-bit grey is scaled, an
animation shows its first frame. Embedded colour profiles are not applied, as in the models' own pipelines.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple
from urllib.parse import unquote_to_bytes

from shared.errors import DataError
from shared.types import Part, Sample, TextPart

if TYPE_CHECKING:
    from PIL import Image

# Without Pillow's readers that start other programs (EPS) or that no viewer has
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
NAMED = "sha256:"  # an image that nobody will look at, by its content alone


class ImageLimits(NamedTuple):
    """What is refused before it is read or decoded."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000


DEFAULT_LIMITS = ImageLimits()


UNLIMITED = ImageLimits(sys.maxsize, sys.maxsize)  # for images that limits have let in before


class ImageError(DataError):
    """An image that cannot be used; says which one and why."""


def load_images(sample: Sample, limits: ImageLimits = DEFAULT_LIMITS) -> list[Image.Image]:
    """A sample's images in RGB, in order.

    Raises:
        ImageError: one that cannot be used; names sample and row.
    """
    try:
        return [open_image(reference, limits) for reference in sample.images]
    except ImageError as error:
        raise ImageError(f"sample {sample.id!r} ({sample.source}): {error}") from None


def open_image(reference: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An image in RGB.

    Raises:
        ImageError: missing, empty, too large, truncated or no image at all.
    """
    try:
        return decode_image(read_image(reference, limits), limits)
    except ImageError as error:
        raise ImageError(f"image {named(reference)}: {error}") from None


def read_image(reference: str, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The encoded bytes of an image.

    Raises:
        ImageError: there is none, or it is empty or too large.
    """
    if reference.startswith("data:"):
        content = data_url_bytes(reference)
    elif reference.startswith((NAMED, "http://", "https://")):
        raise ImageError("it was only looked up, not stored. Load the prompts with a folder for images.")
    else:
        try:
            path = Path(reference).expanduser()
            _check_bytes(path.stat().st_size, limits)
            content = path.read_bytes()
        except OSError as error:
            raise _unreadable(error) from None
    _check_bytes(len(content), limits)
    return content


def image_hash(reference: str, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    """SHA-256 of the encoded bytes, in hex: what makes two images the same, wherever they lie.

    Raises:
        ImageError: as `read_image`.
    """
    if reference.startswith(NAMED):
        return reference.removeprefix(NAMED)
    return content_hash(read_image(reference, limits))


def content_hash(content: bytes) -> str:
    """SHA-256 of encoded bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


class ContentKeys:
    """What of a prompt makes its responses: the chat with images by content, each file read once."""

    def __init__(self) -> None:
        self._hashes: dict[str, str] = {}

    def __call__(self, sample: Sample) -> list[object]:
        """The sample's messages as JSON.

        Raises:
            ImageError: an image that cannot be read; names sample and row.
        """
        try:
            return [
                {"role": message.role, "parts": [self._part(part) for part in message.parts]}
                for message in sample.messages
            ]
        except ImageError as error:
            raise ImageError(f"sample {sample.id!r} ({sample.source}): {error}") from None

    def _part(self, part: Part) -> dict[str, str]:
        if isinstance(part, TextPart):
            return {"text": part.text}
        if part.image not in self._hashes:
            self._hashes[part.image] = NAMED + image_hash(part.image)
        return {"image": self._hashes[part.image]}


def decode_image(content: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Encoded bytes to RGB.

    Raises:
        ImageError: too many pixels, truncated, corrupt, or of a format that is not read.
    """
    image = _opened(io.BytesIO(content), len(content), limits)
    try:
        image.load()
        return as_viewed(image)
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes Pillow's readers raise whatever they stumble over
        raise ImageError(f"truncated or corrupt ({_first_line(error)}). Save it anew.") from None


def check_header(source: bytes | Path, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuse what does not begin as a readable image of an allowed size; nothing is decoded.

    Raises:
        ImageError: missing, empty, too large, or no image.
    """
    if isinstance(source, bytes):
        _opened(io.BytesIO(source), len(source), limits)
        return
    try:
        with source.open("rb") as file:
            _opened(file, source.stat().st_size, limits)
    except OSError as error:
        raise _unreadable(error) from None


def as_viewed(image: Image.Image) -> Image.Image:
    """A loaded image in RGB, upright, on white.

    Raises:
        ImageError: pixels of more than 16 bits, which have no agreed brightness.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def data_url_bytes(url: str) -> bytes:
    """The bytes inside a data URL (RFC 2397).

    Raises:
        ImageError: not of the form data:image/...;base64,... or without valid base64.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:image/"):
        raise ImageError("a data URL of an image is written data:image/png;base64,...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(unquote_to_bytes(body).decode("ascii").split()), validate=True)
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ImageError(f"the data URL is not valid base64 ({error}).") from None


def named(reference: str) -> str:
    """A reference for messages: data URLs are long."""
    return repr(reference if len(reference) <= 120 else f"{reference[:60]}...")


def _opened(file: BinaryIO, size: int, limits: ImageLimits) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    _check_bytes(size, limits)
    try:
        Image.init()
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise ImageError(_too_many(f"over {2 * (Image.MAX_IMAGE_PIXELS or 0)}", limits)) from None
    except UnidentifiedImageError:
        raise ImageError(f"not an image that is read here ({', '.join(FORMATS)}). Convert it.") from None
    except Exception as error:  # as in decode_image
        raise ImageError(f"truncated or corrupt ({_first_line(error)}). Save it anew.") from None
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(_too_many(f"{width} x {height}", limits))
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels. Leave it out.")
    return image


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit; Pillow itself would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
        raise ImageError(f"pixels of mode {image.mode} have no agreed brightness. Convert it to 8 bits.")
    return Image.fromarray((values.astype(np.uint32) * 255 // 0xFFFF).astype(np.uint8))


def _unreadable(error: OSError) -> ImageError:
    return ImageError(f"cannot be read ({error.strerror}). Give a local file or a data URL.")


def _check_bytes(size: int, limits: ImageLimits) -> None:
    if size == 0:
        raise ImageError("empty: 0 bytes.")
    if size > limits.max_bytes:
        raise ImageError(
            f"{size} bytes, more than images.max_bytes: {limits.max_bytes}. Shrink it, or raise the limit."
        )


def _too_many(pixels: str, limits: ImageLimits) -> str:
    return (
        f"{pixels} pixels, more than images.max_pixels: {limits.max_pixels} (a decompression bomb?). "
        "Shrink it, or raise the limit."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
