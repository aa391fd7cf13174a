"""Does a response fit its picture? Those that do not, by a CLIP model's judgement, are not trained on.

The score is CLIPScore (Hessel et al. 2021, arXiv 2104.08718), 2.5 times the cosine between picture and text,
of an open_clip model. It suits what describes a picture; "yes" fits every picture alike, so look at the
scores of good answers before choosing a minimum. CLIP reads the first 77 tokens of a response.

As every filter, it drops pairs and replaces nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eval.metrics.clip_score import scores
from shared.data.images import DEFAULT_LIMITS, ImageLimits, open_image
from shared.data.pairs import Dropped, Grouping
from shared.errors import DataError
from shared.types import Group, Response
from vlm_distill.config_vision import ClipFilterConfig

CHUNK = 64  # pictures that are decoded at a time


def without_misfits(
    grouping: Grouping, config: ClipFilterConfig, *, limits: ImageLimits = DEFAULT_LIMITS, device: str = "cpu"
) -> Grouping:
    """The groups whose responses fit their pictures; the others join what was left out before.

    A response on several pictures is held to the one that it fits best. Samples without a picture stay.

    Raises:
        DataError: no group fits.
        UserError: no such CLIP model, or one without safetensors weights.
        ImageError: a picture that cannot be read.
    """
    judged = [
        (index, response, image)
        for index, group in enumerate(grouping.groups)
        for response in group.responses
        if response.role in config.roles
        for image in group.sample.images
    ]
    best: dict[tuple[int, str], float] = {}
    for chunk in _chunks(judged):
        pictures = [open_image(image, limits) for _, _, image in chunk]
        fits = scores([response.text for _, response, _ in chunk], pictures, config.model, device)
        for (index, response, _), fit in zip(chunk, fits, strict=True):
            best[index, response.role] = max(fit, best.get((index, response.role), 0.0))
    kept, dropped = list[Group](), list(grouping.dropped)
    for index, group in enumerate(grouping.groups):
        misfit = next((r for r in group.responses if best.get((index, r.role), 2.5) < config.minimum), None)
        if misfit is None:
            kept.append(group)
        else:
            dropped.append(Dropped(group.sample.id, misfit.draw, misfit.role, "unlike the image"))
    result = Grouping(kept, dropped)
    if not kept:
        raise DataError(
            f"no group is left to use: {result.summary()}. The best CLIPScore is "
            f"{max(best.values(), default=0.0):.2f}: lower vision.clip_filter.minimum of {config.minimum}."
        )
    return result


def _chunks(judged: Sequence[tuple[int, Response, str]]) -> Iterator[Sequence[tuple[int, Response, str]]]:
    return (judged[start : start + CHUNK] for start in range(0, len(judged), CHUNK))
