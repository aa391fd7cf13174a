"""What do easy-VQA's pictures show, by the answers to the questions on them?

The data set (V. Zhou 2019, PyPI `easy-vqa`) has one coloured shape in each picture and no captions. A
question that names a colour or a shape and is answered yes, or asks for it, tells what there is; of nine
pictures in ten, all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

from shared.errors import UserError
from shared.models.references import resolve_path
from vlm_distill.warm_up import ImageCaption

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NEGATIONS = frozenset({"no", "not"})
FOLDER = "pkg://easy_vqa/data"


def captioned_images(split: Literal["train", "test"]) -> list[ImageCaption]:
    """Every picture whose colour and shape its answers tell, with a caption such as "a red triangle".

    Raises:
        UserError: the package is not installed.
    """
    folder = resolve_path(FOLDER)
    if folder is None:
        raise UserError(f"{FOLDER} is not there. Install the data: pip install --no-deps easy-vqa")
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads(
        (folder / split / "questions.json").read_text(encoding="utf-8")
    ):
        questions.setdefault(image, []).append((question, answer))
    captions = {image: caption(asked) for image, asked in questions.items()}
    return [
        ImageCaption(str(folder / split / "images" / f"{image}.png"), text)
        for image, text in sorted(captions.items())
        if text is not None
    ]


def caption(asked: Sequence[tuple[str, str]]) -> str | None:
    """Colour and shape, by questions and answers on one picture; None where they tell only one or neither."""
    colour = shape = None
    for question, answer in asked:
        words = set(re.findall(r"[a-z]+", question))
        denies = bool(words & NEGATIONS)
        if answer in ("yes", "no") and (answer == "yes") == denies:
            continue
        told = words | {answer}
        colour = next((name for name in COLOURS if name in told), colour)
        shape = next((name for name in SHAPES if name in told), shape)
    return f"a {colour} {shape}" if colour and shape else None
