"""Which language model does an assembled model speak with: one that exists, or a small one made here?

A model made here gets a tokenizer trained on given texts: whole words, or byte-level BPE. Both are trained in
seconds and need no download.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, JsonValue, model_validator

from shared.config_section import Section
from shared.errors import UserError, unknown_name
from shared.models.references import ModelRef, resolve_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, BEGIN, END, UNKNOWN, IMAGE_TOKEN)

# LLaVA-1.5's, for messages whose content is a text or a list of parts
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' %}{{ 'USER: ' }}
  {%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}
  {%- endif -%}
  {%- if message['content'] is string %}{{ message['content'] }}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""
TEMPLATE_WORDS = "USER: ASSISTANT:"


class TokenizerSpec(Section):
    """A tokenizer trained on texts."""

    kind: Literal["word_level", "bpe"] = Field(description="whole words and punctuation, or byte-level BPE")
    texts: tuple[str, ...] = ()
    files: tuple[str, ...] = Field((), description="text files, one text a line")
    vocabulary_size: int = Field(4096, ge=300, description="at most so many tokens; the most frequent")

    @model_validator(mode="after")
    def _has_texts(self) -> TokenizerSpec:
        if not self.texts and not self.files:
            raise ValueError("needs texts or files to train on")
        return self


class LanguageSpec(Section):
    """Either `model`, or `config` with a `tokenizer`."""

    model: ModelRef | None = Field(
        None, description="any causal language model; of a vision-language model, the one inside"
    )
    drop_layers: tuple[int, ...] = Field((), description="blocks of it that are left out")
    config: dict[str, JsonValue] | None = Field(
        None, description="of a new one with random weights: model_type, hidden_size ... as in a config.json"
    )
    tokenizer: ModelRef | TokenizerSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> LanguageSpec:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either model or config")
        if self.model is not None and self.model.quantization is not None:
            raise ValueError("model.quantization: assembled models hold plain weights; remove it")
        if (self.tokenizer is None) != (self.config is None):
            raise ValueError("tokenizer belongs to config: a model brings its own")
        if self.drop_layers and self.model is None:
            raise ValueError("no effect of drop_layers with config; set its number of layers there")
        return self


class Language(NamedTuple):
    """A causal language model and its tokenizer, which has the image token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # for people


def open_language(
    spec: LanguageSpec, *, dtype: str, chat_template: str | None, image_token: str, seed: int
) -> Language:
    """Load or make the language model, and give its tokenizer the image token and the chat template.

    Raises:
        UserError: no such model, blocks it does not have, an unknown model type or key, no texts.
    """
    import torch

    from shared.models.loading import load_tokenizer

    model: Any
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if spec.model is not None:
            tokenizer = load_tokenizer(spec.model)
            model = _load_language(spec.model, getattr(torch, dtype))
            if spec.drop_layers:
                model = _without(model, spec.drop_layers)
            source = spec.model.name
        else:
            assert spec.config is not None and spec.tokenizer is not None
            if isinstance(spec.tokenizer, ModelRef):
                tokenizer = load_tokenizer(spec.tokenizer)
            else:
                tokenizer = train_tokenizer(spec.tokenizer)
            _add_image_token(tokenizer, image_token)
            model = _new_model(spec.config, tokenizer).to(getattr(torch, dtype))
            source = f"a new {spec.config['model_type']}"
        _add_image_token(tokenizer, image_token)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return Language(model.eval(), tokenizer, source)


def train_tokenizer(spec: TokenizerSpec) -> PreTrainedTokenizerBase:
    """A tokenizer of the given texts, with the special tokens of this module.

    Raises:
        UserError: a file that is not there or is no UTF-8 text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trainer: Any
    if spec.kind == "word_level":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        # a space belongs to the word behind it, so that decoding gives the text back
        tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.WordLevelTrainer(
            vocab_size=spec.vocabulary_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=spec.vocabulary_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    tokenizer.train_from_iterator([TEMPLATE_WORDS, *_texts(spec)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
    )


def _texts(spec: TokenizerSpec) -> Iterator[str]:
    yield from spec.texts
    for name in spec.files:
        path = resolve_path(name)
        if path is None or not path.is_file():
            raise UserError(f"tokenizer.files: {name!r} is no file. Give text files, one text a line.")
        try:
            yield from path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"tokenizer.files: {name!r} is not UTF-8 text: {error}.") from None


def _add_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})


def _load_language(ref: ModelRef, dtype: torch.dtype) -> Any:
    """A causal language model, out of a vision-language model where the reference names one."""
    from shared.models.loading import load_causal_lm, load_image_text_model, read_model_config

    if "vision_config" not in read_model_config(ref):
        return load_causal_lm(ref, dtype=dtype)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    whole: Any = load_image_text_model(ref, dtype=dtype)
    inside: Any = getattr(whole.model, "language_model", None)
    config = whole.config.get_text_config()
    causal: Any = (
        AutoModelForCausalLM.from_config(config) if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    )
    if causal is None or type(causal.base_model) is not type(inside):
        raise UserError(
            f"language.model {ref.name!r}: no causal language model can be taken out of "
            f"{type(whole).__name__}. Give the language model that it was made from."
        )
    causal.base_model.load_state_dict(inside.state_dict())
    causal.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
    causal.generation_config = whole.generation_config
    return causal.to(dtype)


def _without(model: Any, drop_layers: Sequence[int]) -> Any:
    from shared.models.pruning import blocks_of, prune_blocks

    count = len(blocks_of(model))
    wrong = [layer for layer in drop_layers if not 0 <= layer < count]
    if wrong or len(set(drop_layers)) >= count:
        raise UserError(
            f"language.drop_layers {list(drop_layers)}: the model has blocks 0 to {count - 1}, of which at "
            "least one stays."
        )
    return prune_blocks(model, [layer for layer in range(count) if layer not in drop_layers])


def _new_model(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A causal language model with random weights for a tokenizer."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = dict(config)
    model_type = str(settings.pop("model_type", "llama"))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            unknown_name("language.config.model_type", model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        )
    known = vars(CONFIG_MAPPING[model_type]()).keys()
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise UserError(unknown_name(f"language.config key of {model_type}", unknown[0], known))
    for name in ("bos", "eos", "pad"):
        settings.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    settings.setdefault("vocab_size", len(tokenizer))
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    except (ValueError, TypeError, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"language.config cannot be used for {model_type}: {told}") from None
