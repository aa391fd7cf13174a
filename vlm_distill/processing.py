"""How do pictures and text become the inputs of an assembled model? Its image processor and its processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images


class OpenClipImageProcessor(BaseImageProcessor):
    """open_clip's own preprocessing for evaluation, by the names of its preprocess_cfg."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size
        self.mean, self.std = mean, std
        self.interpolation, self.resize_mode, self.fill_color = interpolation, resize_mode, fill_color

    def preprocess(self, images: ImageInput, *_: Any, return_tensors: str | None = None, **__: Any) -> Any:
        """`pixel_values` (images, 3, height, width) of PIL images or arrays, nested as one likes."""
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from torchvision.transforms.functional import to_pil_image

        size = self.size if isinstance(self.size, int) else tuple(self.size)
        transform = image_transform_v2(
            PreprocessCfg(
                size=size,
                mean=tuple(self.mean or PreprocessCfg.mean),
                std=tuple(self.std or PreprocessCfg.std),
                interpolation=self.interpolation,
                resize_mode=self.resize_mode,
                fill_color=self.fill_color,
            ),
            is_train=False,
        )
        given: Any = images  # transformers declares only URLs, and passes on what is opened already
        flat: Any = make_flat_list_of_images(self.fetch_images(given))
        pictures = [image if hasattr(image, "convert") else to_pil_image(image) for image in flat]
        pixels = [transform(picture.convert("RGB")).numpy() for picture in pictures]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


class OpenClipLlavaProcessor(ProcessorMixin):
    """Tokenizer and image processor; each `<image>` becomes as many tokens as the model has for a picture."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 1,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """The text that stands for one picture."""
        return self.image_token * self.image_seq_length
