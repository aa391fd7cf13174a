"""Which vision tower does a model look through, and what does it give a picture: a grid of patch tokens?

Any tower that open_clip builds: its own transformers and ResNets, and the timm models it wraps, convolutional
ones too. Every one has `forward_intermediates`; one block's feature map becomes a grid of tokens. What comes
after that block is cut off, so that no weight is carried, trained or adapted that nothing depends on.

Shapes in names: B images, C channels, H and W of the grid, P = H * W patch tokens, D width of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, JsonValue, model_validator

from shared.config_section import Section
from shared.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMES = ("hf-hub:", "local-dir:")
CONFIG_KEYS = ("embed_dim", "vision_cfg", "quick_gelu")
EMBED_DIM = 512  # open_clip's usual one; it has no part in patch tokens
WEIGHTS_FILE = "open_clip_model.safetensors"


class PreprocessSpec(Section):
    """How a picture becomes pixels, where it is not as the tower's own configuration says."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        None, description="shortest: crop the rest; longest: pad; squash: change the aspect"
    )


class TowerSpec(Section):
    """A vision tower. A plain string is short for `{model: ...}`."""

    model: str | dict[str, JsonValue] = Field(
        description="an open_clip name, hf-hub:ID, local-dir:FOLDER, or a configuration as in open_clip"
    )
    weights: str | None = Field(
        None, description="a pretrained tag of open_clip, or a .safetensors file; without it, random"
    )
    layer: int = Field(-2, description="the block whose patch tokens are used; negative from the end")
    image_size: int | None = Field(None, ge=1, description="pixels of a side, instead of the tower's own")
    preprocess: PreprocessSpec = PreprocessSpec()

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _all_has_effect(self) -> TowerSpec:
        if self.weights is not None and isinstance(self.model, str) and self.model.startswith(SCHEMES):
            raise ValueError(
                f"no effect of weights: {self.model} brings its own; remove weights, or name another model"
            )
        return self


class Tower(NamedTuple):
    """A tower ready for assembly."""

    module: nn.Module
    config: dict[str, Any]  # of `modeling.OpenClipVisionConfig`: enough to build it again
    preprocess: dict[str, Any]  # as open_clip's preprocess_cfg
    source: str  # for people


def open_tower(spec: TowerSpec, *, seed: int = 0) -> Tower:
    """Build a tower, load its weights and cut it behind the chosen block.

    Raises:
        UserError: an unknown name, configuration key, tag or layer; weights that are absent, not safetensors,
            or those of another tower.
    """
    import torch

    clip_config, preprocess, weights = resolve(spec)
    vision = clip_config["vision_cfg"]
    own_size, size = vision["image_size"], spec.image_size or vision["image_size"]
    vision["image_size"] = size
    config = {key: clip_config[key] for key in CONFIG_KEYS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = _build(config, _source(spec))
    whole = module.state_dict().keys()
    set_image_size(module, own_size)  # of a timm model, that its weights were trained with
    layers = len(_feature_maps(module, None))
    if not -layers <= spec.layer < layers:
        raise UserError(
            f"vision.layer {spec.layer}: this tower gives the features of {layers} blocks, so use "
            f"{-layers} to {layers - 1}."
        )
    config["layer"] = spec.layer % layers
    cut(module, config["layer"])
    if weights is not None:
        load_weights(module, weights, whole=whole)
    set_image_size(module, size)
    config["hidden_size"], *config["grid"] = _feature_maps(module, [config["layer"]])[0].shape[1:]
    preprocess["size"] = size
    _finish(module)
    return Tower(module, config, preprocess, _source(spec))


def build_tower(config: Mapping[str, Any]) -> nn.Module:
    """The tower of a stored configuration, cut, with random weights."""
    module = _build(config, "a stored configuration")
    set_image_size(module, config["vision_cfg"]["image_size"])
    cut(module, config["layer"])
    _finish(module)
    return module


def patch_tokens(tower: nn.Module, pixels_B3HW: Tensor, layer: int) -> Tensor:
    """The patch tokens (B, P, D) of a cut tower, row by row of its grid."""
    tokens_BDHW: Tensor = tower.forward_intermediates(  # type: ignore[operator]
        pixels_B3HW, indices=[layer], intermediates_only=True, output_fmt="NCHW"
    )["image_intermediates"][0]
    return tokens_BDHW.flatten(2).transpose(1, 2)


def cut(tower: nn.Module, layer: int) -> None:
    """Take away, in place, what follows block `layer`: later blocks, norms, pooling and projection."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from torch import nn

    if isinstance(tower, VisionTransformer):
        tower.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
        tower.attn_pool = None
    elif isinstance(tower, TimmModel):
        tower.trunk.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
        tower.head = nn.Identity()
    elif isinstance(tower, ModifiedResNet):
        for stage in range(layer + 1, 5):
            setattr(tower, f"layer{stage}", nn.Identity())
        tower.attnpool = None


def resolve(spec: TowerSpec) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """What a tower is named by: its open_clip configuration, its preprocessing and its file of weights.

    Raises:
        UserError: an unknown name, configuration key or tag; no weights where there should be some.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    preprocess = merge_preprocess_dict(PreprocessCfg(), {})
    weights: Path | None = None
    if not isinstance(spec.model, str):
        clip_config: dict[str, Any] = json.loads(json.dumps(spec.model))
        if clip_config.keys() - {*CONFIG_KEYS, "text_cfg"} or not isinstance(
            clip_config.get("vision_cfg"), dict
        ):
            raise UserError(
                f"vision.model has the keys {', '.join(map(repr, clip_config))}; a configuration of "
                f"open_clip has {', '.join(CONFIG_KEYS)}, of which vision_cfg is needed."
            )
    elif spec.model.startswith(SCHEMES):
        clip_config, own, weights = _open_folder(spec.model)
        preprocess = merge_preprocess_dict(preprocess, own)
    else:
        clip_config = open_clip.get_model_config(spec.model)
        if clip_config is None:
            message = unknown_name("open_clip model", spec.model, open_clip.list_models())
            raise UserError(f"{message} Or give hf-hub:ID, local-dir:FOLDER or a configuration.")
    if spec.weights is not None:
        weights, own = _weights_of(spec, spec.weights)
        preprocess = merge_preprocess_dict(preprocess, own)
    clip_config.setdefault("embed_dim", EMBED_DIM)
    clip_config.setdefault("quick_gelu", False)
    clip_config["vision_cfg"].setdefault("image_size", 224)
    # nothing is fetched unasked, and no patch is dropped: a model has as many image tokens as its prompts
    clip_config["vision_cfg"].update(timm_model_pretrained=False, patch_dropout=0.0)
    return (
        clip_config,
        merge_preprocess_dict(preprocess, spec.preprocess.model_dump(exclude_none=True)),
        weights,
    )


def load_weights(tower: nn.Module, path: Path, *, whole: Collection[str]) -> None:
    """Fill a tower from a file of its weights, or of a CLIP model that has it.

    Args:
        tower: cut or not.
        path: of safetensors.
        whole: the names of all weights of the tower before it was cut; others are refused.

    Raises:
        UserError: not safetensors, or weights that are missing, superfluous or of another shape.
    """
    from open_clip.model import resize_pos_embed
    from safetensors.torch import load_file
    from torch import nn

    if path.suffix != ".safetensors":
        raise UserError(f"weights {str(path)!r} are not safetensors, and pickles are not read. Convert them.")
    if not path.is_file():
        raise UserError(f"weights {str(path)!r} do not exist.")
    state = load_file(path)
    if any(name.startswith("visual.") for name in state):
        state = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    superfluous = state.keys() - set(whole)
    holder = nn.Module()
    holder.visual = tower
    state = {f"visual.{name}": tensor for name, tensor in state.items()}
    resize_pos_embed(state, holder)
    own = holder.state_dict()
    wrong = sorted(
        [f"{name} is missing" for name in own.keys() - state.keys()]
        + [f"{name} is unknown" for name in superfluous]
        + [
            f"{name} is {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
    )
    if wrong:
        raise UserError(
            f"the weights {str(path)!r} are not those of this tower ({len(wrong)} differences: "
            f"{'; '.join(wrong[:3])}). Name the tower that they were trained with."
        )
    holder.load_state_dict({name: state[name] for name in own})


def set_image_size(tower: nn.Module, size: Any) -> None:
    """Resize a timm model, which is built for its default size; other towers were built for theirs."""
    from open_clip.timm_model import TimmModel

    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(tower, TimmModel):
        default = tuple(tower.trunk.default_cfg.get("input_size", (3, 224, 224))[1:])
        patches = getattr(tower.trunk, "patch_embed", None)
        if tuple(getattr(patches, "img_size", None) or default) != (height, width):
            tower.set_input_size((height, width))
        tower.image_size = (height, width)


def _build(config: Mapping[str, Any], name: str) -> nn.Module:
    from open_clip.model import _build_vision_tower

    try:
        module: nn.Module = _build_vision_tower(
            config["embed_dim"], dict(config["vision_cfg"]), quick_gelu=config["quick_gelu"]
        )
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"vision.model {name} cannot be built by open_clip: {error}") from None
    if not hasattr(module, "forward_intermediates"):
        raise UserError(f"{type(module).__name__} gives no patch tokens (it has no forward_intermediates).")
    return module


def _finish(tower: nn.Module) -> None:
    """Make a tower fit for transformers and peft, in place.

    Buffers that it computed as it was built are saved from now on: transformers loads others empty.
    """
    from vlm_distill.attention import with_plain_attention

    with_plain_attention(tower)
    for module in tower.modules():
        for name in list(module._non_persistent_buffers_set):
            module.register_buffer(name, module.get_buffer(name).clone())


def _feature_maps(tower: Any, layers: list[int] | None) -> list[Tensor]:
    """What blocks give for an empty picture: (1, D, H, W) each."""
    import torch

    size = tower.image_size
    height, width = (size, size) if isinstance(size, int) else size
    tower.eval()
    with torch.no_grad():
        maps: list[Tensor] = tower.forward_intermediates(
            torch.zeros(1, 3, height, width), indices=layers, intermediates_only=True, output_fmt="NCHW"
        )["image_intermediates"]
    return maps


def _open_folder(name: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Configuration, preprocessing and weights of a folder or repository that open_clip wrote."""
    if name.startswith("hf-hub:"):
        folder = _snapshot(name.removeprefix("hf-hub:"))
    else:
        folder = Path(name.removeprefix("local-dir:")).expanduser()
    path = folder / "open_clip_config.json"
    if not path.is_file():
        raise UserError(
            f"vision.model {name!r}: no open_clip_config.json in {folder}. Name an open_clip model."
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        clip_config, preprocess = stored["model_cfg"], stored.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"vision.model {name!r}: {path} is not a configuration ({error!r}).") from None
    files = sorted(
        folder.glob("*.safetensors"), key=lambda file: (not file.name.startswith("open_clip"), file)
    )
    if not files:
        raise UserError(f"vision.model {name!r} has no .safetensors weights in {folder}. Name one that has.")
    return clip_config, preprocess, files[0]


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"vision.model 'hf-hub:{name}' was not given by the hub: {error}") from error


def _weights_of(spec: TowerSpec, weights: str) -> tuple[Path, dict[str, Any]]:
    """The file of a tag or a path, and the preprocessing that belongs to a tag."""
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    path = Path(weights).expanduser()
    if path.suffix or path.exists():
        return path, {}
    tag = get_pretrained_cfg(spec.model, weights) if isinstance(spec.model, str) else {}
    if not tag:
        known = list_pretrained_tags_by_model(spec.model) if isinstance(spec.model, str) else []
        raise UserError(
            f"{unknown_name('pretrained tag of open_clip', weights, known)} Or give a .safetensors file."
        )
    try:
        return Path(download_pretrained(tag)), tag
    except OSError as error:
        raise UserError(
            f"vision.weights {weights!r} could not be fetched: {error}. Fetch the file, and give its path "
            f"(open_clip {open_clip.__version__})."
        ) from error


def _source(spec: TowerSpec) -> str:
    if isinstance(spec.model, str):
        return spec.model
    vision = spec.model.get("vision_cfg")
    name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    return str(name) if name else json.dumps(vision)
