"""How does each family of vision-language models take its images: which tensors, batched how, in which grid?

Tensors of several samples are joined along their first axis; what that axis counts differs, and with it how a
batch is split again:

- `image`: one entry an image (LLaVA, PaliGemma), tiles of an image on the second axis (LLaVA-NeXT);
- `patches`: the patches of all images in one row, as many as `image_grid_thw` says (Qwen-VL);
- `tiles`: the tiles of all images in one row (InternVL, Gemma 3);
- `row`: one entry for each sample that has images, images and tiles on the second axis (Idefics 3, SmolVLM);
- `sample`: one entry for each sample that has images, a number rather than pixels (LLaVA-OneVision).

Read from the modeling and processing files of transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Batching = Literal["image", "patches", "tiles", "row", "sample"]


class Cell(NamedTuple):
    """What one image token stands for: a cell of a tile's grid, or the end of a row of cells."""

    tile: int  # 0 is the whole picture, where there are tiles
    row: int
    column: int

    @property
    def is_separator(self) -> bool:
        """Whether it marks the end of a row of cells instead of showing anything."""
        return self.column < 0


class Picture(NamedTuple):
    """One image as a processor prepared it, for the question which token shows what."""

    tokens: int  # image tokens in the prompt
    runs: tuple[int, ...]  # the same, cut where other tokens stand between them
    grid_thw: tuple[int, int, int] | None  # Qwen-VL: patches in time, height and width
    size: tuple[int, int] | None  # height and width in pixels, where the processor says
    config: Any  # the model's configuration


Grid = Callable[[Picture], Sequence[Cell]]


class Family(NamedTuple):
    """One way of feeding images to a language model."""

    batching: Mapping[str, Batching]
    grid: Grid
    features: Literal["image", "tiles", "row"] = "image"  # what one entry of `get_image_features` belongs to
    response_types: Mapping[str, int] = {}  # keys with a value a token: theirs at response tokens, if not 0
    first_position: int = 0
    position_axes: bool = False  # M-RoPE: `get_rope_index` gives time, height and width


def square(cells: int, tile: int = 0) -> list[Cell]:
    """A square grid, or one row where the number is not a square."""
    side = math.isqrt(cells)
    height, width = (side, side) if side * side == cells else (1, cells)
    return rectangle(height, width, tile)


def rectangle(height: int, width: int, tile: int = 0) -> list[Cell]:
    """All cells of a grid, row by row."""
    return [Cell(tile, row, column) for row in range(height) for column in range(width)]


def _one_grid(picture: Picture) -> list[Cell]:
    """The grid that a configuration of ours states, or else a square."""
    grid = getattr(picture.config, "image_grid", None)
    return square(picture.tokens) if grid is None else rectangle(*grid)


def _square_runs(picture: Picture) -> list[Cell]:
    """A square for each run of image tokens; of several, the last is the whole picture (Idefics 3)."""
    whole = len(picture.runs) - 1
    return [
        cell
        for index, run in enumerate(picture.runs)
        for cell in square(run, 0 if index == whole else index + 1)
    ]


def _square_runs_whole_first(picture: Picture) -> list[Cell]:
    """A square for each run of image tokens, the whole picture first (Gemma 3's pan and scan)."""
    return [cell for tile, run in enumerate(picture.runs) for cell in square(run, tile)]


def _equal_tiles(picture: Picture) -> list[Cell]:
    """InternVL: squares of the same size; of several, the last is the whole picture."""
    per_tile = _tile_tokens(picture)
    tiles = picture.tokens // per_tile
    return [cell for t in range(tiles) for cell in square(per_tile, 0 if t == tiles - 1 else t + 1)]


def _tile_tokens(picture: Picture) -> int:
    vision, ratio = picture.config.vision_config, picture.config.downsample_ratio
    size, patch = _first(vision.image_size), _first(vision.patch_size)
    return int((size // patch * ratio) ** 2)


def _merged_patches(picture: Picture) -> list[Cell]:
    assert picture.grid_thw is not None
    time, height, width = picture.grid_thw
    merge = picture.config.vision_config.spatial_merge_size
    return rectangle(time * height // merge, width // merge)


def _base_and_unpadded(picture: Picture) -> list[Cell]:
    """LLaVA-NeXT and OneVision: the whole picture, then its tiles as one grid whose rows end in a newline.

    Among several images OneVision shows each as the whole picture and one newline.
    """
    vision = picture.config.vision_config
    side = _first(vision.image_size) // _first(vision.patch_size)
    base = square(side * side)
    rest = picture.tokens - len(base)
    if rest == 1:
        return [*base, Cell(0, side - 1, -1)]
    height, width = _divide(rest, picture.size)
    detail = [Cell(1, row, c if c < width else -1) for row in range(height) for c in range(width + 1)]
    return [*base, *detail]


def _divide(tokens: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """The height and width with height * (width + 1) = tokens that fit the picture's proportions best."""
    height, width = size or (1, 1)
    fits = [(h, tokens // h - 1) for h in range(1, tokens + 1) if tokens % h == 0 and tokens // h > 1]
    return min(fits, key=lambda hw: abs(math.log(hw[1] / hw[0] * height / width)), default=(1, tokens - 1))


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


_QWEN: Mapping[str, Batching] = {"pixel_values": "patches", "image_grid_thw": "image"}
_IDEFICS: Mapping[str, Batching] = {"pixel_values": "row", "pixel_attention_mask": "row"}
_LLAVA = Family({"pixel_values": "image", "image_sizes": "image"}, _one_grid)
_TILED_LLAVA: Mapping[str, Batching] = {"pixel_values": "image", "image_sizes": "image"}

# By `model_type`. One line adds a family; docs/ADDING_A_MODALITY.md goes through it.
FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "vlm_distill_llava": _LLAVA,
    "llava_next": Family(_TILED_LLAVA, _base_and_unpadded),
    "llava_onevision": Family({**_TILED_LLAVA, "batch_num_images": "sample"}, _base_and_unpadded),
    "qwen2_5_vl": Family(_QWEN, _merged_patches, position_axes=True),
    "qwen3_vl": Family(_QWEN, _merged_patches, position_axes=True),
    "idefics3": Family(_IDEFICS, _square_runs, features="row"),
    "smolvlm": Family(_IDEFICS, _square_runs, features="row"),
    "internvl": Family({"pixel_values": "tiles"}, _equal_tiles, features="tiles"),
    # its prefix sees both ways, which token type 0 says; positions count from 1
    "paligemma": Family(
        {"pixel_values": "image"}, _one_grid, response_types={"token_type_ids": 1}, first_position=1
    ),
    "gemma3": Family({"pixel_values": "tiles"}, _square_runs_whole_first, features="tiles"),
}


def entries(family: Family, vision: Mapping[str, Tensor]) -> int:
    """How many entries `get_image_features` gives for a sample's tensors."""
    if not vision:
        return 0
    if family.features == "row":
        return 1
    key = next((k for k, v in family.batching.items() if v == family.features and k in vision), None)
    assert key is not None, (family, list(vision))
    return len(vision[key])
