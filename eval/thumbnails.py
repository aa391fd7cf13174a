"""How do images get into a report? Small, each once, and no more than a page can carry."""

from __future__ import annotations

import base64
import io

from shared.data.images import UNLIMITED, ImageError, named, open_image

SIDE_PX = 384  # the longer one
QUALITY = 80  # of JPEG
BUDGET_BYTES = 24_000_000  # of all images in one page


class Gallery:
    """The images of one page.

    Args:
        budget_bytes: What all of them may take, as `data:` URLs.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.urls: list[str] = []
        self.unreadable: set[str] = set()  # paths
        self.left_out: set[str] = set()  # paths, beyond the budget
        self._left_bytes = budget_bytes
        self._places: dict[str, int] = {}  # by path and by URL: the same image may have several paths

    def place(self, path: str) -> int | None:
        """Where an image stands in `urls`; None where it cannot be read, or is beyond the budget."""
        if path in self.unreadable or path in self.left_out:
            return None
        if path not in self._places:
            if self._left_bytes <= 0:
                self.left_out.add(path)
                return None
            url = thumbnail(path)
            if url is None:
                self.unreadable.add(path)
                return None
            if url not in self._places:
                if len(url) > self._left_bytes:
                    self._left_bytes = 0  # the page says where it ends, so nothing smaller slips in after it
                    self.left_out.add(path)
                    return None
                self._left_bytes -= len(url)
                self._places[url] = len(self.urls)
                self.urls.append(url)
            self._places[path] = self._places[url]
        return self._places[path]

    @property
    def note(self) -> str:
        """What is missing, for a reader of the page."""
        parts = []
        if self.left_out:
            parts.append(
                f"{len(self.left_out):,} images are left out: the first {len(self.urls):,} fill the "
                "page's share for images."
            )
        if self.unreadable:
            example = named(min(self.unreadable))
            parts.append(f"{len(self.unreadable):,} images could not be read, such as {example}.")
        return " ".join(parts)


def thumbnail(path: str) -> str | None:
    """A small JPEG as a `data:` URL; None if it cannot be read."""
    try:
        image = open_image(path, UNLIMITED)  # a model has looked at it
    except ImageError:
        return None  # the gallery counts it
    image.thumbnail((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
