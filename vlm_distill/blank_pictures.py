"""What does a model see that sees nothing? A picture of the same size in its processor's mean colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from shared.errors import UserError


def blank_like(size: tuple[int, int], colour: Sequence[float]) -> str:
    """A data URL of an empty picture, `size` its width and height, `colour` red, green and blue in [0, 1]."""
    from PIL import Image

    file = io.BytesIO()
    red, green, blue = (round(255 * part) for part in colour)
    Image.new("RGB", size, (red, green, blue)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def mean_colour(image_processor: Any) -> Sequence[float]:
    """What an image processor subtracts, in [0, 1].

    Raises:
        UserError: it says nothing of it.
    """
    for name in ("image_mean", "mean"):  # of transformers, and of open_clip's preprocessing
        colour = getattr(image_processor, name, None)
        if isinstance(colour, list | tuple) and len(colour) == 3:
            return colour
    raise UserError(
        f"{type(image_processor).__name__} names no mean colour (image_mean), so vision.advantage has no "
        "blank to compare with. Remove it."
    )
