"""Does a caption fit its image, judged without references? CLIPScore, and RefCLIPScore where there are some.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", with c a caption, v
its image and r a reference as CLIP embeds them:

    CLIPScore    = 2.5 · max(cos(c, v), 0)
    RefCLIPScore = harmonic mean of CLIPScore and max over r of max(cos(c, r), 0)

Texts get the prompt of the paper, "A photo depicts". The factor 2.5 spreads usual scores over 0 to 1. Scores
by different CLIP models do not compare.

Shapes: B a batch, N samples, R references of all samples, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.checks import InputError, items, same_length, string_lists, strings
from eval.metrics.summary import Result, summary
from eval.statistics import estimate
from shared.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PAPERS_MODEL = "timm/vit_base_patch32_clip_224.openai"
PROMPT = "A photo depicts "
WEIGHT = 2.5
BATCH = 64


def compute(
    predictions: Sequence[str],
    images: Sequence[str | Path | Image],
    references: Sequence[str | Sequence[str]] | None = None,
    model: str = PAPERS_MODEL,
    device: str = "cpu",
) -> Result:
    """CLIPScore of captions.

    Args:
        predictions: The captions.
        images: For each caption, its image: a path or a PIL image.
        references: For each caption, what people wrote: a list, or a string where there is one.
        model: An open_clip model with safetensors weights, hub id or local folder; by default the paper's.
        device: Where it runs.

    Returns:
        `clip_score`, at least 0 and rarely above 1, `stderr`, `n`; with references also `ref_clip_score` and
        `ref_clip_score_stderr`.

    Raises:
        InputError: Not strings, an image that cannot be read, or unequal lengths; names the index.
        UserError: No such model, or one without safetensors weights.
    """
    captions, pictures = _checked(predictions, images)
    rows = None if references is None else string_lists("references", references)
    if rows is not None:
        same_length(predictions=captions, references=rows)

    clip = _load(model, device)
    caption_ND = _embed_texts(clip, captions)
    fit_N = _fit(caption_ND, _embed_images(clip, pictures))
    result = summary("clip_score", (WEIGHT * fit_N).tolist())
    if rows is None:
        return result
    reference_RD = _embed_texts(clip, [text for row in rows for text in row])
    best = [
        float((near_rD @ caption_D).max().clamp(min=0))
        for caption_D, near_rD in zip(caption_ND, reference_RD.split([len(r) for r in rows]), strict=True)
    ]
    with_references = estimate(
        [_harmonic_mean(WEIGHT * float(fit), near) for fit, near in zip(fit_N, best, strict=True)]
    )
    return result | {
        "ref_clip_score": with_references.value,
        "ref_clip_score_stderr": with_references.stderr,
    }


def scores(
    predictions: Sequence[str],
    images: Sequence[str | Path | Image],
    model: str = PAPERS_MODEL,
    device: str = "cpu",
) -> list[float]:
    """The CLIPScore of each caption, of which `compute` gives the mean.

    Raises:
        InputError, UserError: As `compute`.
    """
    captions, pictures = _checked(predictions, images)
    clip = _load(model, device)
    fits: list[float] = (WEIGHT * _fit(_embed_texts(clip, captions), _embed_images(clip, pictures))).tolist()
    return fits


def _checked(
    predictions: Sequence[str], images: Sequence[str | Path | Image]
) -> tuple[list[str], list[Callable[[], Image]]]:
    captions = strings("predictions", predictions)
    pictures = [_opener(index, image) for index, image in enumerate(items("images", images))]
    same_length(predictions=captions, images=pictures)
    return captions, pictures


def _fit(caption_ND: Tensor, image_ND: Tensor) -> Tensor:
    """The cosines (N) of unit vectors, at least 0."""
    return (caption_ND * image_ND).sum(dim=1).clamp(min=0)


class _Clip(NamedTuple):
    model: Any  # open_clip's; it has no types
    preprocess: Callable[[Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    device: str


def find_model(name: str) -> Path:
    """The folder of a CLIP model, from the hub where it is no folder here.

    Raises:
        UserError: No such model, or one without safetensors weights.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"CLIP model {name!r} has no .safetensors weights in {folder}. Name one that has.")
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(
            f"CLIP model {name!r} has no open_clip_config.json in {folder}: not an open_clip model."
        )
    return folder


@lru_cache(maxsize=1)  # teacher, start and student are scored one after another
def _load(name: str, device: str) -> _Clip:
    import open_clip

    folder = find_model(name)
    source = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(source, device=device)
    return _Clip(model.eval(), preprocess, open_clip.get_tokenizer(source), device)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"CLIP model {name!r} is neither a folder nor a model that the hub gave: {error}. "
            "Pass model= a local folder with open_clip_config.json and safetensors weights."
        ) from error


def _opener(index: int, image: str | Path | Image) -> Callable[[], Image]:
    """A function that opens the image, so that a batch at a time is held in memory."""
    from PIL import Image as pil

    if isinstance(image, pil.Image):
        return lambda: image
    if not isinstance(image, str | Path):
        raise InputError(f"images[{index}] is {image!r}; allowed is a path or a PIL image.")

    def open_it() -> Image:
        try:
            with pil.open(image) as opened:
                return opened.convert("RGB")
        except OSError as error:
            raise InputError(f"images[{index}] cannot be read from {str(image)!r}: {error}") from error

    return open_it


def _embed_texts(clip: _Clip, texts: list[str]) -> Tensor:
    """Unit vectors (N, D) of texts."""
    import torch

    def embed(batch: list[str]) -> Tensor:
        tokens = clip.tokenize([PROMPT + text for text in batch]).to(clip.device)
        return clip.model.encode_text(tokens, normalize=True).float().cpu()

    with torch.inference_mode():
        return torch.cat([embed(batch) for batch in _batches(texts)])


def _embed_images(clip: _Clip, pictures: list[Callable[[], Image]]) -> Tensor:
    """Unit vectors (N, D) of images."""
    import torch

    def embed(batch: list[Callable[[], Image]]) -> Tensor:
        pixels = torch.stack([clip.preprocess(open_it()) for open_it in batch]).to(clip.device)
        return clip.model.encode_image(pixels, normalize=True).float().cpu()

    with torch.inference_mode():
        return torch.cat([embed(batch) for batch in _batches(pictures)])


def _batches(rows: list[Any]) -> Iterator[list[Any]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _harmonic_mean(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0
