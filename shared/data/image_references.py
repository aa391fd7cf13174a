"""Which image does a row mean: what its column holds, to a reference that can be read later.

A value is a path below the image root, a data URL, encoded bytes, {bytes, path} as `datasets.Image` stores
it, an image of Pillow, or, only where asked for, an http(s) URL. Paths become absolute; bytes are kept by the
`Keep` that the caller chose.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from shared.config_data import ImagesConfig
from shared.data.images import (
    NAMED,
    ImageError,
    ImageLimits,
    as_viewed,
    check_header,
    content_hash,
    data_url_bytes,
    decode_image,
    named,
    read_image,
)
from shared.data.web_images import fetch
from shared.durable import committed_file

_WEB = ("http://", "https://")

Keep = Callable[[bytes], str]


class Handling(NamedTuple):
    """What is done with the images of a run."""

    config: ImagesConfig = ImagesConfig()
    keep: Keep = lambda content: NAMED + content_hash(content)  # the hash alone: nobody will look at them
    look: Literal["header", "decode"] = "header"
    downloads: Path | None = None  # what URLs gave, to be the same on resuming; None: nothing is fetched


def as_data_url(content: bytes) -> str:
    """Keep bytes in the reference itself: for few images."""
    return f"data:image/*;base64,{base64.b64encode(content).decode('ascii')}"


def in_folder(folder: Path) -> Keep:
    """Keep bytes as files of a folder, each content once."""
    return lambda content: str(_stored(content, folder / content_hash(content)))


class ImageFinder:
    """References of one source's images; each distinct value is looked at once."""

    def __init__(self, root: Path, handling: Handling) -> None:
        """`root` is where relative paths start, and what no path may leave."""
        self._root = root.expanduser().resolve()
        self._handling = handling
        self._limits = ImageLimits(handling.config.max_bytes, handling.config.max_pixels)
        self._known: dict[str, str | ImageError] = {}
        self._folders: dict[str, Path] = {}

    def reference(self, value: object) -> str:
        """The reference of what an image column holds.

        Raises:
            ImageError: no image, or one that cannot be used.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self._kept(value)
        if not isinstance(value, str) or not value:
            return self._kept(_encoded(value))
        if value not in self._known:
            try:
                self._known[value] = self._find(value)
            except ImageError as error:
                self._known[value] = ImageError(f"image {named(value)}: {error}")
        found = self._known[value]
        if isinstance(found, ImageError):
            raise found
        return found

    def _find(self, value: str) -> str:
        start = value[:8].lower()
        if start.startswith("data:"):
            return self._kept(data_url_bytes(value))
        if start.startswith(_WEB):
            return self._fetched(value)
        path = self._inside(value)
        if self._handling.look == "header":
            check_header(path, self._limits)
        else:
            decode_image(read_image(str(path), self._limits), self._limits)
        return str(path)

    def _inside(self, value: str) -> Path:
        # links and ".." are followed, so that the comparison holds; a folder's once for all its images
        folder, name = os.path.split(os.path.join(self._root, value))
        if folder not in self._folders:
            self._folders[folder] = Path(folder).resolve()
        path = self._folders[folder] / name
        if name == ".." or path.is_symlink():
            path = path.resolve()
        if not path.is_relative_to(self._root):
            raise ImageError(
                f"lies outside the image root {self._root}. Set image_root of the source (of a task, "
                "data.images) to a folder that holds all its images."
            )
        if not path.is_file():
            raise ImageError(
                f"there is no such file below the image root {self._root}. Check image_root (of a task, "
                "data.images)."
            )
        return path

    def _kept(self, content: bytes) -> str:
        if self._handling.look == "header":
            check_header(content, self._limits)
        else:
            decode_image(content, self._limits)
        return self._handling.keep(content)

    def _fetched(self, url: str) -> str:
        handling = self._handling
        if not handling.config.allow_remote:
            raise ImageError("on the web. Download it, or set prompts.images.allow_remote: true.")
        if handling.downloads is None:
            return url
        path = handling.downloads / f"url-{hashlib.sha256(url.encode()).hexdigest()}"
        if not path.exists():
            content = fetch(url, handling.config)
            decode_image(content, self._limits)
            _stored(content, path)
        return str(path.resolve())


def _encoded(value: object) -> bytes:
    """An image that was decoded already, without loss."""
    from PIL import Image

    if not isinstance(value, Image.Image):
        raise ImageError(
            f"an image must be a path, a URL, bytes or {{bytes, path}}; got {type(value).__name__}"
        )
    file = io.BytesIO()
    as_viewed(value).save(file, "PNG")
    return file.getvalue()


def _stored(content: bytes, path: Path) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with committed_file(path) as file:
            file.write(content)
    return path.resolve()
