"""How does a vision-language model see a chat with images? Its processor, its template, its response rows.

Shapes: B sequences, T padded tokens, N rows that predict response tokens.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import AlignmentError, UserError
from shared.models.chat_template import check_response, refuse_idle_arguments, turn_end_id
from shared.models.vocabulary import Vocabulary
from shared.types import Encoded, Group, Layout, Sample
from vlm_distill.blank_pictures import blank_like, mean_colour
from vlm_distill.families import FAMILIES, Cell, Family, entries
from vlm_distill.image_tokens import input_map
from vlm_distill.prompt_reader import Prompt, PromptReader

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from shared.adapter import Adapter
    from shared.additions import Additions
    from shared.config_models import StudentConfig
    from shared.models.references import ModelRef
    from shared.session import Session

PLACEHOLDER_KEYS = ("image_token_id", "image_token_index", "video_token_id", "boi_token_index")


class VlmAdapter:
    """The vision-language adapter of one model.

    Args:
        processor: tokenizer, image processor and chat template of the model.
        config: the model's configuration; its `model_type` says how it takes images.
        open_image: gives the picture behind a reference, upright and in RGB.
        stop_ids: ends of sequence beside the tokenizer's own and the template's turn end.
        system_prompt: put before chats that have no system turn.
        template_arguments: passed to the chat template.

    Raises:
        UserError: no image placeholder, no stop token, template arguments that cannot take effect.
    """

    accepts_images = True

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        *,
        open_image: Callable[[str], Image],
        stop_ids: Sequence[int] = (),
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._processor: Any = processor
        self._tokenizer = self._processor.tokenizer
        self._open_image = open_image
        self._family: Family | None = FAMILIES.get(config.model_type)
        self._reader = PromptReader(
            processor,
            self._family,
            config,
            open_image=open_image,
            system_prompt=system_prompt,
            template_arguments=template_arguments,
        )
        refuse_idle_arguments(
            template_arguments or {},
            self._reader.template,
            inspect.signature(self._processor.apply_chat_template).parameters,
            self._tokenizer.name_or_path,
        )
        self.image_token_id = _image_token_id(self._processor, config)
        turn_end = turn_end_id(self._tokenizer, lambda chat: self._reader.render(chat, generate=False))
        self._turn_end = self._tokenizer.eos_token_id if turn_end is None else turn_end
        placeholders = {getattr(config, key, None) for key in PLACEHOLDER_KEYS} | {self.image_token_id}
        self.vocabulary = Vocabulary.of(
            self._tokenizer,
            stop_ids=stop_ids if turn_end is None else (*stop_ids, turn_end),
            placeholder_ids=[index for index in placeholders if index is not None],
        )
        identity = f"{self.vocabulary.fingerprint} {config.model_type} {self._reader.fingerprint}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def describe(self, sample: Sample) -> str:
        """What stands where in the model's input: text, and which token shows which piece of which image."""
        return input_map(self._reader, sample, self.image_token_id).describe(self._tokenizer)

    def image_places(self, sample: Sample) -> list[list[tuple[int, Cell]]]:
        """For each image of a sample, the positions of its tokens in the prompt, and what they show."""
        pieces = input_map(self._reader, sample, self.image_token_id).pieces
        places: list[list[tuple[int, Cell]]] = [[] for _ in sample.images]
        for piece in pieces:
            if piece.image is not None:
                places[piece.image] += zip(range(piece.start, piece.stop), piece.cells, strict=False)
        return places

    def blank(self, reference: str) -> str:
        """The reference of a picture as large as another, in the colour that preprocessing makes 0.

        Raises:
            UserError: the image processor names no mean colour.
        """
        return blank_like(self._open_image(reference).size, mean_colour(self._processor.image_processor))

    def prompt_tokens(self, sample: Sample) -> int:
        """How many tokens the prompt takes, image tokens included."""
        return self._reader.tokens(sample)

    def encode_text(self, text: str, *, stop: bool) -> tuple[int, ...]:
        """Token ids of an answer given as text, ending with the turn-end token if `stop`."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, self._turn_end) if stop else tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def save_pretrained(self, folder: Path) -> None:
        """Write processor, tokenizer and chat template."""
        self._processor.save_pretrained(folder)

    def encode_prompts(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """Left-padded inputs for generation: token keys (B, T) and the images' tensors."""
        import torch

        prompts = [self._reader.read(sample) for sample in samples]
        longest = max(len(prompt.ids) for prompt in prompts)
        rows = {"input_ids": [_left(prompt.ids, longest, self._pad_id) for prompt in prompts]}
        rows["attention_mask"] = [_left((1,) * len(prompt.ids), longest, 0) for prompt in prompts]
        for key in prompts[0].token_types:
            rows[key] = [_left(prompt.token_types[key], longest, 0) for prompt in prompts]
        return {**{key: torch.tensor(value) for key, value in rows.items()}, **_joined(prompts)}

    def encode(self, groups: Sequence[Group], *, layout: Layout = "separate") -> Encoded:
        """Right-padded sequences of prompts with their responses, as `shared.data.layouts` describes.

        Images enter once for a group, whichever the layout: where a group has several sequences,
        `image_entries` says which of the image features each sequence takes (`shared.models.heads`).

        Raises:
            AlignmentError: a response without tokens, or with a token that this model does not have.
        """
        from shared.data.layouts import groups_of_sequences, lay_out

        for group in groups:
            for response in group.responses:
                check_response(
                    group.sample, response.token_ids, self.vocabulary, self._tokenizer.name_or_path
                )
        prompts = [self._reader.read(group.sample) for group in groups]
        responses = [[response.token_ids for response in group.responses] for group in groups]
        positions = [prompt.positions_AP for prompt in prompts if prompt.positions_AP is not None]
        encoded = lay_out(
            [prompt.ids for prompt in prompts],
            responses,
            layout=layout,
            pad_id=self._pad_id,
            prompt_positions=positions or None,
        )
        inputs = dict(encoded.inputs)
        if self._family is not None:
            inputs["position_ids"] = inputs["position_ids"] + self._family.first_position
        owners = groups_of_sequences(responses, layout)
        inputs.update(self._token_types([prompts[owner] for owner in owners], inputs["input_ids"].shape[1]))
        inputs.update(self._vision(prompts, owners))
        return encoded._replace(inputs=inputs)

    def check(self, groups: Sequence[Group], encoded: Encoded) -> None:
        """An encoding must hold these samples' own prompts and images, as this model's processor gives them.

        Raises:
            AlignmentError: naming the sample and what is not its own.
        """
        import torch

        from shared.data.layouts import groups_of_sequences
        from shared.data.rows import check_prompts

        prompts = [self._reader.read(group.sample) for group in groups]
        check_prompts(groups, encoded, [prompt.ids for prompt in prompts])
        layout: Layout = "joint" if len(encoded.inputs["input_ids"]) == len(groups) else "separate"
        expected = self._vision(prompts, groups_of_sequences([g.responses for g in groups], layout))
        for key, own in expected.items():
            given = encoded.inputs.get(key)
            if given is None:
                owner = next(i for i, prompt in enumerate(prompts) if prompt.vision)
                raise _foreign(groups[owner], f"the model's {key!r} is missing")
            if given.shape != own.shape or not torch.equal(given.cpu(), own):
                raise _foreign(groups[self._differing(prompts, key, given)], f"{key!r} is not its own")

    def _differing(self, prompts: Sequence[Prompt], key: str, given: Tensor) -> int:
        """The first group whose piece of a joined tensor is another's."""
        start = 0
        holders = [index for index, prompt in enumerate(prompts) if key in prompt.vision]
        for index in holders:
            piece = prompts[index].vision[key]
            theirs = given[start : start + len(piece)].cpu()
            inside = tuple(slice(size) for size in piece.shape)
            if theirs[inside].shape != piece.shape or not theirs[inside].equal(piece):
                return index
            start += len(piece)
        return (holders or [0])[-1]

    def _token_types(self, prompts: Sequence[Prompt], longest: int) -> dict[str, Tensor]:
        import torch

        fills = self._family.response_types if self._family is not None else {}
        return {
            key: torch.tensor(
                [
                    [*prompt.token_types[key], *[fills.get(key, 0)] * (longest - len(prompt.ids))]
                    for prompt in prompts
                ]
            )
            for key in prompts[0].token_types
        }

    def _vision(self, prompts: Sequence[Prompt], owners: Sequence[int]) -> dict[str, Tensor]:
        """The images' tensors for sequences that belong to `owners` among the prompts."""
        import torch

        once = list(owners) == list(range(len(prompts)))
        if once or not any(prompt.vision for prompt in prompts):
            return _joined(prompts)
        if self._family is None:  # not known what the features of such a model are cut into
            return _joined([prompts[owner] for owner in owners])
        counts = [entries(self._family, prompt.vision) for prompt in prompts]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        wanted = [starts[owner] + i for owner in owners for i in range(counts[owner])]
        return {**_joined(prompts), "image_entries": torch.tensor(wanted)}

    @property
    def _pad_id(self) -> int:
        pad: int | None = self._tokenizer.pad_token_id
        return self.vocabulary.stop_ids[0] if pad is None else pad  # masked out, so any id serves


class VlmAdapterKind:
    """Models with images and text in, text out: the entry point `vlm` of `vlm_distill.adapters`."""

    def claims(self, model_config: Mapping[str, object]) -> bool:
        """Whether the configuration is of a language model with a vision tower."""
        return "vision_config" in model_config and "audio_config" not in model_config

    def open(self, ref: ModelRef, options: Mapping[str, object] | None = None) -> VlmAdapter:
        """The adapter of a model. Options: none yet.

        Raises:
            UserError: no processor, no chat template, or an option that is not known.
        """
        from shared.data.images import UNLIMITED, open_image
        from shared.models.loading import generation_eos_ids, load_config, load_processor

        if options:
            raise UserError(f"the vision-language adapter has no options; got {', '.join(sorted(options))}.")
        processor = load_processor(ref)
        config = load_config(ref)
        if not processor.chat_template and config.model_type not in TEMPLATE_FREE:
            raise UserError(
                f"model {ref.name!r}: its processor has no chat template. Give it one as "
                f"`model: {{name: {ref.name}, chat_template: FILE.jinja}}`."
            )
        return VlmAdapter(
            processor,
            config,
            # loading looked at every image under the run's own limits, which may be wider than the default
            open_image=partial(open_image, limits=UNLIMITED),
            stop_ids=generation_eos_ids(ref),
            system_prompt=ref.system_prompt,
            template_arguments=ref.template_arguments,
        )

    def load(self, ref: ModelRef, *, dtype: torch.dtype) -> PreTrainedModel:
        """The model's weights, in eval mode, on the CPU."""
        from shared.models.loading import load_image_text_model

        return load_image_text_model(ref, dtype=dtype)

    def make_student(
        self,
        config: StudentConfig,
        start: PreTrainedModel,
        adapter: Adapter,
        samples: Sequence[Sample],
        *,
        seed: int,
    ) -> nn.Module:
        """What is trained: the whole model, low-rank updates, or each part as `student.parts` says.

        Raises:
            UserError: parts without a picture among the prompts, or that the model does not have.
        """
        import copy

        import torch

        from shared.models.students import make_student
        from vlm_distill.config import VlmStudentConfig
        from vlm_distill.parts import apply_parts

        if not isinstance(config, VlmStudentConfig) or config.parts is None:
            return make_student(config, start, seed=seed)
        shown = next((sample for sample in samples if sample.images), None)
        if shown is None:
            raise UserError(
                "student.parts needs a picture to look through, and no prompt has one. Remove it."
            )
        student: Any = copy.deepcopy(start).to(getattr(torch, config.dtype))
        taken = inspect.signature(student.get_image_features).parameters
        looked_at = {
            name: tensor.to(student.device)
            for name, tensor in adapter.encode_prompts([shown]).items()
            if name in taken and name != "input_ids"
        }
        return apply_parts(
            student,
            config.parts,
            vision_inputs=looked_at,
            lora=config.lora,
            dora=config.method == "dora",
            seed=seed,
        )

    def additions(self, session: Session) -> Additions:
        """What `vision` asks for.

        Raises:
            UserError: a tower that cannot be found or is trained, a CLIP model that cannot be loaded.
        """
        from vlm_distill.additions import vision_additions

        return vision_additions(session)


TEMPLATE_FREE = frozenset({"paligemma"})  # a prompt is a prefix, not a chat


def _joined(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Image tensors of several prompts along the first axis, the others filled up with zeros."""
    import torch

    joined = {}
    for key in dict.fromkeys(key for prompt in prompts for key in prompt.vision):
        pieces = [prompt.vision[key] for prompt in prompts if key in prompt.vision]
        inner = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
        whole = pieces[0].new_zeros(sum(map(len, pieces)), *inner)
        start = 0
        for piece in pieces:
            whole[(slice(start, start + len(piece)), *map(slice, piece.shape[1:]))] = piece
            start += len(piece)
        joined[key] = whole if len(pieces) > 1 else torch.clone(whole)
    return joined


def _left(values: Sequence[int], length: int, fill: int) -> list[int]:
    return [fill] * (length - len(values)) + list(values)


def _image_token_id(processor: Any, config: Any) -> int:
    for holder, key in (
        (config, "image_token_id"),
        (config, "image_token_index"),
        (processor, "image_token_id"),
    ):
        index = getattr(holder, key, None)
        if isinstance(index, int):
            return index
    raise UserError(
        f"{type(processor).__name__} and the configuration of {config.model_type!r} name no image token "
        "(image_token_id), so nothing says where images stand. Use a model whose images are tokens."
    )


def _foreign(group: Group, cause: str) -> AlignmentError:
    return AlignmentError(
        f"sample {group.sample.id!r}: {cause}. Images were mixed up with another sample's or another "
        "model's, so the run stops."
    )
