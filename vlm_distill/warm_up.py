"""How does a tower learn to see before a language model looks through it? By telling captions apart.

Contrastive image-text training as open_clip does it: its CLIP model with a small text tower, its `ClipLoss`
(Radford et al. 2021, arXiv 2103.00020). Pictures with the same caption would be each other's negatives, so no
caption occurs twice in a batch. The result is a folder that open_clip loads (`local-dir:FOLDER`), and an
assembly too.

Every step is a function of the seed and its number, so an interrupted warm-up goes on where it was and ends
with the same weights.

Shapes in names: B pictures of a batch, E width of the shared embedding, T tokens of a caption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from shared.config_section import Section
from shared.data.images import open_image
from shared.errors import UserError
from vlm_distill.language import END, TokenizerSpec, train_tokenizer
from vlm_distill.towers import TowerSpec, load_weights, resolve, set_image_size
from vlm_distill.warm_up_folder import WarmedUp, claim, finish, resume, save_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

HEAD_WIDTH = 16  # of the text tower
LONGEST_CAPTION = 77  # tokens; CLIP's
MAX_LOGIT_SCALE = math.log(100)  # CLIP's
PIXEL_BYTES = 2**30  # of decoded pictures that are kept in memory


class WarmUpConfig(Section):
    """How long, how fast, against which text tower."""

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=2, description="pictures of a step; fewer where captions repeat")
    learning_rate: float = Field(2e-3, gt=0, description="falls to 0 by a cosine")
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, le=1, description="share of all steps")
    text_width: int = Field(64, ge=HEAD_WIDTH, multiple_of=HEAD_WIDTH)
    text_layers: int = Field(1, ge=1)
    checkpoint_steps: int = Field(200, ge=1)


class ImageCaption(NamedTuple):
    """A picture by reference (a path or a data URL) and what it shows."""

    image: str
    caption: str


def warm_up_tower(
    spec: TowerSpec,
    pairs: Sequence[ImageCaption],
    folder: Path,
    config: WarmUpConfig,
    *,
    seed: int,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> WarmedUp:
    """Train a tower, or finish what was begun in `folder`, or give what is there.

    Args:
        spec: the whole tower is trained, from its weights if it names some; `layer` has no part in it.
        pairs: pictures with captions.
        folder: of this warm-up alone.
        config: the length and the optimiser.
        seed: of weights and batches.
        device: where it runs.
        progress: called with the number of each step and its loss.

    Raises:
        StoreError: the folder holds a warm-up with other settings.
        UserError: fewer than two different captions, a tower that cannot be built.
        ImageError: a picture that cannot be read.
    """
    import torch

    identity = _identity(spec, pairs, config, seed)
    finished = claim(folder, identity)
    if finished is not None:
        return finished
    by_caption: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_caption.setdefault(pair.caption, []).append(index)
    if len(by_caption) < 2:
        raise UserError(
            f"a warm-up tells captions apart, and the {len(pairs)} pictures have {len(by_caption)} between "
            "them. Give pictures with different captions."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = _new_clip(spec, list(by_caption), config)
    # convolutions are up to 1.6 times as fast so, on a CPU
    model = made.model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.learning_rate)
    step, history = resume(folder, model, optimizer)
    pixels = _Pixels(pairs, made.preprocess)
    for batch in _batches(by_caption, config.batch_size, seed, start=step, stop=config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        images_B3HW = torch.stack([pixels[index] for index in batch]).to(device)
        texts_BT = made.tokenize([pairs[index].caption for index in batch]).to(device)
        history.append(_train(model, optimizer, images_B3HW, texts_BT))
        step += 1
        if progress is not None:
            progress(step, history[-1][0])
        if step % config.checkpoint_steps == 0 and step < config.steps:
            save_checkpoint(folder, model, optimizer, step, history)
    return finish(folder, model, made.tokenizer, made.config, made.preprocess, history)


class _Made(NamedTuple):
    model: Any  # open_clip's CLIP; it has no types
    config: dict[str, Any]
    preprocess: dict[str, Any]
    tokenizer: Any

    def tokenize(self, captions: list[str]) -> Tensor:
        """Ids (B, T), padded on the right."""
        ids: Tensor = self.tokenizer(
            captions,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.config["text_cfg"]["context_length"],
        ).input_ids
        return ids


def _new_clip(spec: TowerSpec, captions: Sequence[str], config: WarmUpConfig) -> _Made:
    from open_clip.model import CLIP
    from tokenizers.processors import TemplateProcessing

    clip_config, preprocess, weights = resolve(spec)
    clip_config["vision_cfg"]["image_size"] = spec.image_size or clip_config["vision_cfg"]["image_size"]
    preprocess["size"] = clip_config["vision_cfg"]["image_size"]
    tokenizer: Any = train_tokenizer(TokenizerSpec(kind="word_level", texts=tuple(captions)))
    tokenizer.padding_side = "right"
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, end)]
    )
    longest = max(len(ids) for ids in tokenizer(list(captions)).input_ids)
    clip_config["text_cfg"] = {
        "context_length": min(longest, LONGEST_CAPTION),
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": ".",  # the folder itself
        "width": config.text_width,
        "heads": config.text_width // HEAD_WIDTH,
        "layers": config.text_layers,
        "pool_type": "eos",
        "eos_id": end,
        "pad_id": tokenizer.pad_token_id,
    }
    names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    clip_config = {name: clip_config[name] for name in names}
    try:
        model = CLIP(**clip_config, output_dict=True)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"vision.model cannot be built by open_clip: {error}") from None
    if weights is not None:
        load_weights(model.visual, weights, whole=model.visual.state_dict().keys())
    set_image_size(model.visual, preprocess["size"])
    return _Made(model, clip_config, preprocess, tokenizer)


def _train(
    model: Any, optimizer: torch.optim.Optimizer, images_B3HW: Tensor, texts_BT: Tensor
) -> tuple[float, float]:
    """One step; its loss and the share of pictures nearest to their own caption."""
    import torch
    from open_clip.loss import ClipLoss

    images_BE = model.encode_image(images_B3HW, normalize=True)
    texts_BE = model.encode_text(texts_BT, normalize=True)
    loss = ClipLoss()(images_BE, texts_BE, model.logit_scale.exp())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        nearest_B = (images_BE @ texts_BE.T).argmax(dim=1)
        hits = (nearest_B == torch.arange(len(nearest_B), device=nearest_B.device)).float().mean()
    return loss.item(), hits.item()


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Gains, biases and the temperature are not decayed, as in open_clip's training."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _schedule(step: int, config: WarmUpConfig) -> float:
    rise = config.warmup * config.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(config.steps - rise, 1)))


def _batches(
    by_caption: dict[str, list[int]], size: int, seed: int, *, start: int, stop: int
) -> Iterator[list[int]]:
    """For each step, pictures of different captions, the likelier the more pictures a caption has.

    Weighted drawing without replacement as by Efraimidis and Spirakis (2006).
    """
    import torch

    pictures = list(by_caption.values())
    counts = torch.tensor([len(numbers) for numbers in pictures], dtype=torch.float64)
    for step in range(start, stop):
        digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest[:4]))  # it has 32 bits of seed
        keys = torch.rand(len(pictures), generator=source, dtype=torch.float64).log() / counts
        drawn = keys.topk(min(size, len(pictures))).indices.tolist()
        places = torch.rand(len(drawn), generator=source, dtype=torch.float64).tolist()
        yield [
            pictures[caption][int(place * len(pictures[caption]))]
            for caption, place in zip(drawn, places, strict=True)
        ]


class _Pixels:
    """Pictures as the tower takes them; kept as long as they fit into memory."""

    def __init__(self, pairs: Sequence[ImageCaption], preprocess: dict[str, Any]) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self._pairs, self._kept, self._bytes = pairs, dict[int, Any](), 0
        self._transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)

    def __getitem__(self, index: int) -> Tensor:
        if index in self._kept:
            kept: Tensor = self._kept[index]
            return kept
        pixels: Tensor = self._transform(open_image(self._pairs[index].image))
        self._bytes += pixels.nbytes
        if self._bytes <= PIXEL_BYTES:
            self._kept[index] = pixels
        return pixels


def _identity(
    spec: TowerSpec, pairs: Sequence[ImageCaption], config: WarmUpConfig, seed: int
) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"checkpoint_steps"})
    pictures = hashlib.sha256("\0".join(f"{p.image}\0{p.caption}" for p in pairs).encode()).hexdigest()[:16]
    return {
        "tower": spec.model_dump(mode="json", exclude={"layer"}),
        "settings": settings,
        "seed": seed,
        "pairs": pictures,
    }
