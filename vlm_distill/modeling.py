"""What is a LLaVA-style model around any open_clip tower, to transformers: its configuration and its module?

It is transformers' Llava with another tower, projector and head; merging of image tokens, generation and
names (`model.vision_tower`, `model.multi_modal_projector`, `model.language_model`, `lm_head`) are Llava's.
`vlm_distill.registration` makes the Auto classes know it.

Shapes in names: B images, P patch tokens, N image tokens, D width of the tower, E width of the text model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    GenerationMixin,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from shared.models.heads import logit_scale, softcap
from vlm_distill.projectors import Projector
from vlm_distill.towers import build_tower, patch_tokens


class OpenClipVisionConfig(PreTrainedConfig):
    """A cut open_clip tower: what `towers.open_tower` found out about it."""

    model_type = "vlm_distill_vision"
    base_config_key = "vision_config"

    embed_dim: int = 512
    vision_cfg: dict[str, Any] | None = None  # as in open_clip's configurations
    quick_gelu: bool = False
    layer: int = 0  # the block whose features are given, the last that there is
    hidden_size: int = 768
    grid: list[int] | tuple[int, ...] = (7, 7)  # rows and columns of patch tokens

    @property
    def image_size(self) -> int | list[int]:
        """Pixels of a side, or height and width."""
        assert self.vision_cfg is not None
        size: int | list[int] = self.vision_cfg["image_size"]
        return size


class OpenClipLlavaConfig(LlavaConfig):
    """A tower, a projector and a language model."""

    model_type = "vlm_distill_llava"

    projector: str = "mlp"
    reduction: str = "none"
    reduction_factor: int = 1
    head_bias: bool = False

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's image tokens."""
        vision: Any = self.vision_config
        return vision.grid[0] // self.reduction_factor, vision.grid[1] // self.reduction_factor


class OpenClipVisionModel(PreTrainedModel):
    """An open_clip tower that gives its patch tokens."""

    config_class = OpenClipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True  # the tower has its own attention, and every setting of the language model's

    def __init__(self, config: OpenClipVisionConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # timm computes values that a meta device cannot hold
            self.tower = build_tower(config.to_dict())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: open_clip has initialised the tower."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Patch tokens (B, P, D) of pictures (B, 3, height, width)."""
        return BaseModelOutput(
            last_hidden_state=patch_tokens(self.tower, pixel_values.to(self.dtype), self.config.layer)
        )


class LanguageHead(nn.Linear):
    """A language model's head together with what the model does to its logits (scaling, soft-capping)."""

    def __init__(self, text_config: PreTrainedConfig, *, bias: bool) -> None:
        super().__init__(text_config.hidden_size, text_config.vocab_size, bias=bias)
        self.logit_scale, self.softcap = logit_scale(text_config), softcap(text_config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        logits = super().forward(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class OpenClipLlavaModel(LlavaModel):
    """Tower, projector and language model, without the head."""

    config_class = OpenClipLlavaConfig
    config: OpenClipLlavaConfig

    def __init__(self, config: OpenClipLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        vision: Any = config.vision_config
        self.vision_tower = OpenClipVisionModel._from_config(vision)
        self.multi_modal_projector = Projector(  # type: ignore[assignment]  # in the place of Llava's own
            config.projector,  # type: ignore[arg-type]
            grid=vision.grid,
            reduction=config.reduction,  # type: ignore[arg-type]
            factor=config.reduction_factor,
            tower_width=vision.hidden_size,
            text_width=config.text_config.hidden_size,  # type: ignore[union-attr]
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The embeddings of image tokens: `pooler_output` has (N, E) for each image."""
        tokens_BPD = self.vision_tower(pixel_values).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens_BPD,
            pooler_output=list(self.multi_modal_projector(tokens_BPD)),  # type: ignore[arg-type]  # as Llava's
        )


class OpenClipLlavaForConditionalGeneration(LlavaForConditionalGeneration, GenerationMixin):
    """The whole model."""

    config_class = OpenClipLlavaConfig
    config: OpenClipLlavaConfig

    def __init__(self, config: OpenClipLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = OpenClipLlavaModel(config)
        self.lm_head = LanguageHead(config.text_config, bias=config.head_bias)  # type: ignore[arg-type]
        embeddings = self.model.language_model.get_input_embeddings()
        names = {module: name for name, module in self.named_modules()}
        self._tied_weights_keys = {"lm_head.weight": f"{names[embeddings]}.weight"}
        self.post_init()
