"""How does lmms_eval see a model of ours? As one of its own, whose every answer is made and stored by us."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmms_eval.api.model import lmms
from PIL import Image

from eval.bridges.asking import Asker, Document, Generation
from shared.data.image_references import in_folder
from shared.errors import UserError
from shared.types import ImagePart, Message, TextPart

MODES = ("L", "RGB", "RGBA")  # of images that go into a file as they are


class AskedModel(lmms):  # type: ignore[misc]  # a class of a package that need not be there
    """One model for one task.

    Args:
        asker: Makes and stores.
        folder: Where images are written, by their content.
    """

    is_simple = True

    def __init__(self, asker: Asker, folder: Path) -> None:
        super().__init__()
        self._asker = asker
        self._keep = in_folder(folder)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Replies; a request that stands several times is drawn as often."""
        wanted, draws = [], dict[tuple[Document, int], int]()
        for request in requests:
            context, settings, doc_to_visual, doc_id, task, split = request.args
            key = ((task, int(doc_id)), request.idx)
            draws[key] = draws.get(key, -1) + 1
            shown = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
            images = [ImagePart(self._file(task, image)) for image in shown]
            message = Message("user", (*images, TextPart(context)))
            wanted.append(Generation(key[0], key[1], draws[key], (message,), settings))
        return self._asker.generate(wanted)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not built."""
        raise UserError("the task asks for log-likelihoods about images, which is not built. Take another.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not built."""
        raise UserError("the task has several rounds, which is not built. Take another.")

    def _file(self, task: str, image: object) -> str:
        if not isinstance(image, Image.Image):
            raise UserError(
                f"lmms_eval:{task} shows {type(image).__name__}, as of a film or a sound, and our engines "
                "take images alone. Take another task."
            )
        content = io.BytesIO()
        (image if image.mode in MODES else image.convert("RGB")).save(content, "PNG")
        return self._keep(content.getvalue())
