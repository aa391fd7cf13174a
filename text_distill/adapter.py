"""How does a causal language model see a chat? Its tokenizer, its template, and its response rows.

Shapes: B sequences, T padded tokens, N rows that predict response tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.models.chat_template import (
    chat_of,
    check_response,
    refuse_idle_arguments,
    render_chat,
    turn_end_id,
    warn_of_dates,
    with_system_prompt,
)
from shared.models.loading import (
    generation_eos_ids,
    load_causal_lm,
    load_tokenizer,
    read_model_config,
    require_chat_template,
)
from shared.models.references import ModelRef
from shared.models.vocabulary import Vocabulary
from shared.types import Encoded, Group, Layout, Message, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shared.adapter import Adapter
    from shared.additions import Additions
    from shared.config_models import StudentConfig
    from shared.session import Session


class TextAdapter:
    """The text adapter of one model: renders chats, tokenises prompts, lays out responses.

    Args:
        tokenizer: with a chat template.
        stop_ids: ends of sequence beside the tokenizer's own and the template's turn end.
        system_prompt: put before chats that have no system turn.
        template_arguments: passed to the chat template.
        takes_position_ids: whether the model's forward does; a few families have no such argument.

    Raises:
        UserError: template arguments that cannot take effect, no stop token.
    """

    accepts_images = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int] = (),
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        takes_position_ids: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._template_arguments = dict(template_arguments or {})
        self._takes_position_ids = takes_position_ids
        refuse_idle_arguments(
            self._template_arguments,
            tokenizer.get_chat_template(),
            inspect.signature(tokenizer.apply_chat_template).parameters,
            tokenizer.name_or_path,
        )
        warn_of_dates(tokenizer.get_chat_template(), self._template_arguments, tokenizer.name_or_path)
        turn_end = turn_end_id(tokenizer, lambda chat: self._render(chat, generate=False))
        self._turn_end = tokenizer.eos_token_id if turn_end is None else turn_end
        more_stops = stop_ids if turn_end is None else (*stop_ids, turn_end)
        self.vocabulary = Vocabulary.of(tokenizer, stop_ids=more_stops)
        identity = [
            self.vocabulary.fingerprint,
            tokenizer.get_chat_template(),
            system_prompt,
            self._template_arguments,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self, sample: Sample) -> str:
        """The rendered prompt, special tokens included.

        Raises:
            UserError: a sample with images, or one that the model's template refuses.
        """
        if sample.images:
            raise UserError(
                f"sample {sample.id!r} ({sample.source}) has images, and this is a text model. "
                "Use distill-vlm, or remove the images."
            )
        messages = with_system_prompt(sample.messages, self._system_prompt)
        return render_chat(sample, lambda: self._render(messages, generate=True))

    def prompt_ids(self, sample: Sample) -> list[int]:
        """The prompt's token ids."""
        # the template has written every special token already
        ids: list[int] = self._tokenizer(self.describe(sample), add_special_tokens=False)["input_ids"]
        return ids

    def prompt_tokens(self, sample: Sample) -> int:
        """How many tokens the rendered prompt takes."""
        return len(self.prompt_ids(sample))

    def encode_text(self, text: str, *, stop: bool) -> tuple[int, ...]:
        """Token ids of an answer given as text, ending with the turn-end token if `stop`."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, self._turn_end) if stop else tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)  # type: ignore[return-value]

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer and its chat template."""
        self._tokenizer.save_pretrained(folder)

    def encode_prompts(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """Left-padded `input_ids` and `attention_mask` (B, T) for generation."""
        import torch

        prompts = [self.prompt_ids(sample) for sample in samples]
        longest = max(map(len, prompts))
        input_ids_BT = torch.full((len(prompts), longest), self._pad_id)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, prompt in enumerate(prompts):
            input_ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask_BT[row, longest - len(prompt) :] = 1
        return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}

    def encode(self, groups: Sequence[Group], *, layout: Layout = "separate") -> Encoded:
        """Right-padded sequences of prompts with their responses, as `shared.data.layouts` describes.

        Raises:
            AlignmentError: a response without tokens, or with a token that this model does not have.
        """
        from shared.data.layouts import lay_out

        for group in groups:
            for response in group.responses:
                check_response(
                    group.sample, response.token_ids, self.vocabulary, self._tokenizer.name_or_path
                )
        encoded = lay_out(
            [self.prompt_ids(group.sample) for group in groups],
            [[response.token_ids for response in group.responses] for group in groups],
            layout=layout,
            pad_id=self._pad_id,
        )
        if self._takes_position_ids:
            return encoded
        # such a model counts from 0 by itself, which is right as long as no positions restart
        assert layout == "separate", "a model without position_ids cannot restart them"
        return encoded._replace(inputs={k: v for k, v in encoded.inputs.items() if k != "position_ids"})

    def check(self, groups: Sequence[Group], encoded: Encoded) -> None:
        """Every sequence must begin with its own sample's prompt.

        Raises:
            AlignmentError: naming the sample.
        """
        from shared.data.rows import check_prompts

        check_prompts(groups, encoded, [self.prompt_ids(group.sample) for group in groups])

    @property
    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return self.vocabulary.stop_ids[0] if pad is None else pad  # masked out, so any id serves

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
            chat_of(messages), add_generation_prompt=generate, tokenize=False, **self._template_arguments
        )


class TextAdapterKind:
    """Causal language models: the entry point `text` of `vlm_distill.adapters`."""

    def claims(self, model_config: Mapping[str, object]) -> bool:
        """Whether the configuration is of a language model without other inputs."""
        other_inputs = ("vision_config", "audio_config", "speech_config", "vision_tower")
        return not any(key in model_config for key in other_inputs)

    def open(self, ref: ModelRef, options: Mapping[str, object] | None = None) -> TextAdapter:
        """The adapter of a model.

        Raises:
            UserError: no tokenizer, no chat template, template arguments that cannot take effect, a stop
                token that the tokenizer does not have, or an option (text has none).
        """
        if options:
            raise UserError(f"the text adapter has no options; got {', '.join(sorted(options))}.")
        tokenizer = load_tokenizer(ref)
        require_chat_template(tokenizer, ref)
        return TextAdapter(
            tokenizer,
            stop_ids=generation_eos_ids(ref),
            system_prompt=ref.system_prompt,
            template_arguments=ref.template_arguments,
            takes_position_ids=_takes_position_ids(read_model_config(ref)),
        )

    def load(self, ref: ModelRef, *, dtype: torch.dtype) -> PreTrainedModel:
        """The model's weights, in eval mode, on the CPU."""
        return load_causal_lm(ref, dtype=dtype)

    def make_student(
        self,
        config: StudentConfig,
        start: PreTrainedModel,
        adapter: Adapter,
        samples: Sequence[Sample],
        *,
        seed: int,
    ) -> nn.Module:
        """What is trained: the whole model, or low-rank updates of it."""
        from shared.models.students import make_student

        del adapter, samples  # a text model is the same whatever it reads
        return make_student(config, start, seed=seed)

    def additions(self, session: Session) -> Additions:
        """None."""
        from shared.additions import NOTHING

        del session
        return NOTHING


def _takes_position_ids(model_config: Mapping[str, object]) -> bool:
    """Whether the model's forward has that argument; one whose code comes with it counts as most do."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = model_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return True
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
    return model_class is None or "position_ids" in inspect.signature(model_class.forward).parameters
