"""How does a model's own processor see a prompt with its images: token ids, image tensors, positions?

Every prompt is read alone, so that no batch can shift or swap anything; batches are joined afterwards. What
was read is remembered: token ids by prompt, image tensors by images, within a budget of bytes. A chat that
was read before is not read again for other pictures of the same sizes: they stand for as many tokens.

Shapes in names: P tokens of a prompt, A position axes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from shared.data.images import ImageError
from shared.errors import UserError
from shared.models.chat_template import render_chat, with_system_prompt
from shared.types import ImagePart, Message, Sample, TextPart
from vlm_distill.families import Family

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, ProcessorMixin

REMEMBERED_PROMPTS = 1 << 17
REMEMBERED_BYTES = 512 << 20  # of prepared images
REFERENCE = "vlm_distill_reference"  # where an opened image carries its own reference

K = TypeVar("K")
V = TypeVar("V")


class Prompt(NamedTuple):
    """One prompt as a model takes it."""

    ids: tuple[int, ...]
    token_types: Mapping[str, tuple[int, ...]]  # what a processor says of every token, by key
    vision: Mapping[str, Tensor]  # as the processor gives them for this sample alone; empty without images
    positions_AP: Tensor | None  # for M-RoPE


class _Words(NamedTuple):
    """All of a prompt but its pictures."""

    ids: tuple[int, ...]
    token_types: Mapping[str, tuple[int, ...]]
    positions_AP: Tensor | None


class _Seen(NamedTuple):
    """What a processor makes of pictures, and their widths and heights before."""

    vision: Mapping[str, Tensor]
    sizes: tuple[tuple[int, int], ...]


class PromptReader:
    """Reads samples with one model's processor.

    Args:
        processor: with a tokenizer, an image processor and a chat template.
        family: how the model takes images; None for one that is not in the table.
        config: the model's configuration.
        open_image: gives the picture behind a reference, upright and in RGB.
        system_prompt: put before chats that have no system turn.
        template_arguments: passed to the chat template.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        family: Family | None,
        config: PreTrainedConfig,
        *,
        open_image: Callable[[str], Image],
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.processor: Any = processor
        self.family = family
        self.config = config
        self._open_image = open_image
        self._system_prompt = system_prompt
        self._template_arguments = dict(template_arguments or {})
        self._bos: str | None = self.processor.tokenizer.bos_token
        self._prompts: _Recent[Sample, _Words] = _Recent(REMEMBERED_PROMPTS, _one)
        self._chats: _Recent[tuple[object, ...], _Words] = _Recent(REMEMBERED_PROMPTS, _one)
        self._images: _Recent[tuple[str, ...], _Seen] = _Recent(REMEMBERED_BYTES, _vision_bytes)
        self._opened: _Recent[str, Image] = _Recent(REMEMBERED_BYTES // 4, _pixel_bytes)
        self._image_processor = _RememberingImageProcessor(self.processor.image_processor)

    @property
    def fingerprint(self) -> str:
        """Of processor, template and their settings."""
        processor = {
            key: value
            for key, value in json.loads(self.processor.to_json_string()).items()
            if key not in ("processor_class", "name_or_path")
        }
        image_processor = json.loads(self._image_processor.inner.to_json_string())
        parts = [processor, image_processor, self.template, self._system_prompt, self._template_arguments]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def template(self) -> str:
        """The chat template's source; empty for a processor that has none."""
        template = self.processor.chat_template or ""
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    def render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The chat as text, one placeholder an image."""
        if not self.template:  # PaliGemma: images first, then the text; the processor does the rest
            token = self.processor.image_token
            images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
            return str(token) * images + "\n".join(message.text for message in messages)
        text: str = self.processor.apply_chat_template(
            [{"role": m.role, "content": [_content(part) for part in m.parts]} for m in messages],
            add_generation_prompt=generate,
            tokenize=False,
            **self._template_arguments,
        )
        return text

    def text(self, sample: Sample) -> str:
        """The rendered prompt of a sample.

        Raises:
            UserError: the template refuses it, or its placeholders are not its images.
        """
        messages = with_system_prompt(sample.messages, self._system_prompt)
        text = render_chat(sample, lambda: self.render(messages, generate=True))
        token = self.processor.image_token
        if text.count(token) != len(sample.images):
            written = [part for m in messages for part in m.parts if _holds(part, token)]
            cause = (
                f"its text holds {token!r} itself, which this model reads as an image: remove it"
                if written
                else "the model's chat template leaves images out: give the model another `chat_template`"
            )
            raise UserError(
                f"sample {sample.id!r} ({sample.source}): {len(sample.images)} images, but the rendered "
                f"prompt has {text.count(token)} places for one; {cause}."
            )
        return text

    def read(self, sample: Sample) -> Prompt:
        """The prompt of a sample, out of memory where it was read before.

        Raises:
            UserError: an image that cannot be opened, or a prompt that the processor refuses.
        """
        words, seen = self._prompts.get(sample), self._images.get(sample.images)
        if words is None and seen is not None:
            words = self._chats.get(_chat(sample, seen))
        if words is None or seen is None:
            words, seen = self._read(sample)
            self._images.put(sample.images, seen)
            if self.family is not None:  # of other families it is not known what tokens depend on
                self._chats.put(_chat(sample, seen), words)
        self._prompts.put(sample, words)
        return Prompt(words.ids, words.token_types, seen.vision, words.positions_AP)

    def tokens(self, sample: Sample) -> int:
        """How many tokens the prompt takes."""
        return len((self._prompts.get(sample) or self.read(sample)).ids)

    def call(self, sample: Sample, **options: Any) -> Mapping[str, Any]:
        """What the processor gives for one sample.

        Raises:
            UserError: naming the sample.
        """
        text = self.text(sample)
        try:
            images = [self._picture(reference) for reference in sample.images]
        except ImageError as error:
            raise ImageError(f"sample {sample.id!r} ({sample.source}): {error}") from None
        # a template that writes the first token would otherwise meet the tokenizer's own
        twice = bool(self._bos) and text.startswith(self._bos or "")
        original, self.processor.image_processor = self.processor.image_processor, self._image_processor
        try:
            output: Mapping[str, Any] = self.processor(
                text=[text],
                images=[images] if images else None,
                add_special_tokens=not twice,
                **options,
            )
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"sample {sample.id!r} ({sample.source}): {type(self.processor).__name__} refuses it: "
                f"{error}. Change the sample, or leave it out."
            ) from error
        finally:
            self.processor.image_processor = original
        return output

    def _read(self, sample: Sample) -> tuple[_Words, _Seen]:
        output = dict(self.call(sample, return_tensors="pt"))
        ids_P = output.pop("input_ids")[0]
        output.pop("attention_mask", None)
        output.pop("labels", None)  # PaliGemma's, for training with its own loss
        token_types = {
            key: tuple(value[0].tolist())
            for key, value in list(output.items())
            if tuple(value.shape) == (1, len(ids_P))
            and key not in (self.family.batching if self.family else ())
        }
        vision = {key: value for key, value in output.items() if key not in token_types}
        unknown = [key for key in vision if self.family and key not in self.family.batching]
        if unknown:
            raise UserError(
                f"{type(self.processor).__name__} gives {', '.join(map(repr, unknown))}, and how a batch of "
                f"{self.config.model_type} holds that is not known. Add it to vlm_distill/families.py."
            )
        words = _Words(tuple(ids_P.tolist()), token_types, self._positions(ids_P, token_types, vision))
        return words, _Seen(vision, tuple(self._picture(reference).size for reference in sample.images))

    def _picture(self, reference: str) -> Image:
        image = self._opened.get(reference)
        if image is None:
            image = self._open_image(reference)
            image.info[REFERENCE] = reference
            self._opened.put(reference, image)
        return image

    def _positions(
        self, ids_P: Tensor, token_types: Mapping[str, Sequence[int]], vision: Mapping[str, Tensor]
    ) -> Tensor | None:
        if self.family is None or not self.family.position_axes:
            return None
        import torch

        if not vision:
            return torch.arange(len(ids_P)).repeat(3, 1)
        given = {
            "input_ids": ids_P[None],
            "attention_mask": torch.ones_like(ids_P)[None],
            **{key: torch.tensor([value]) for key, value in token_types.items()},
            **vision,
        }
        rule = self._backbone.get_rope_index
        positions_A1P, _ = rule(**{k: v for k, v in given.items() if k in inspect.signature(rule).parameters})
        result: Tensor = positions_A1P[:, 0]
        return result

    @property
    def _backbone(self) -> Any:
        """The model without memory for weights: the rule of its positions is a method."""
        if self.__dict__.get("_empty_model") is None:
            import torch
            from transformers import AutoModelForImageTextToText

            with torch.device("meta"):
                model: Any = AutoModelForImageTextToText.from_config(self.config)
            self._empty_model = model.base_model
        return self._empty_model

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_empty_model": None}
        caches: dict[str, Any] = {
            name: _Recent(cache.budget, cache.size)
            for name, cache in self.__dict__.items()
            if isinstance(cache, _Recent)
        }
        return {**self.__dict__, **caches, **fresh}


class _Recent(Generic[K, V]):
    """A mapping that forgets what was used least recently once its budget is spent."""

    def __init__(self, budget: int, size: Callable[[V], int]) -> None:
        self.budget, self.size = budget, size
        self._items: OrderedDict[K, V] = OrderedDict()
        self._used = 0

    def get(self, key: K) -> V | None:
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        if key in self._items:
            self._used -= self.size(self._items.pop(key))
        self._items[key] = value
        self._used += self.size(value)
        while self._used > self.budget and len(self._items) > 1:
            self._used -= self.size(self._items.popitem(last=False)[1])


class _RememberingImageProcessor:
    """An image processor that prepares the same picture once, and is the original in all else."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._last: _Recent[tuple[tuple[str, ...], str], Any] = _Recent(REMEMBERED_BYTES // 4, _bytes_of)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        key = (tuple(image.info[REFERENCE] for image in _flat(images)), repr((args, sorted(kwargs.items()))))
        prepared = self._last.get(key)
        if prepared is None:
            prepared = self.inner(images, *args, **kwargs)
            self._last.put(key, prepared)
        return type(prepared)(dict(prepared))  # processors take out what the model does not read

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def _flat(images: Any) -> list[Any]:
    return [x for image in images for x in _flat(image)] if isinstance(images, list | tuple) else [images]


def _one(_: object) -> int:
    return 1


def _chat(sample: Sample, seen: _Seen) -> tuple[object, ...]:
    """All that the tokens of a prompt depend on: its turns, and how large the pictures in them are."""
    turns = (
        (message.role, tuple(part if isinstance(part, TextPart) else None for part in message.parts))
        for message in sample.messages
    )
    return (seen.sizes, *turns)


def _vision_bytes(seen: _Seen) -> int:
    return _bytes_of(seen.vision)


def _pixel_bytes(image: Image) -> int:
    return image.width * image.height * 3


def _bytes_of(tensors: Mapping[str, Any]) -> int:
    return sum(getattr(value, "nbytes", 64) for value in tensors.values())


def _content(part: TextPart | ImagePart) -> Mapping[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


def _holds(part: TextPart | ImagePart, token: str) -> bool:
    return isinstance(part, TextPart) and token in part.text
