"""How does a model reference become a configuration, a tokenizer, a model?

Everything a user can get wrong about a model reference ends as one `UserError`. Weights are read from
safetensors or GGUF only, and a checkpoint that does not fill the model is refused: transformers would draw
the rest at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.models.load_errors import user_errors
from shared.models.loras import LORA_FILES, check_lora, merge_lora
from shared.models.quantization import check_quantization, loading_arguments, plain, settled
from shared.models.references import ModelRef, resolve_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def with_base(ref: ModelRef) -> ModelRef:
    """The base model with the LoRA, where a reference names the folder of a LoRA; else the reference itself.

    Raises:
        UserError: the folder does not say what its base is, or two LoRAs are named.
    """
    path = resolve_path(ref.name)
    if path is None or (path / "config.json").exists() or not (path / LORA_FILES[0]).is_file():
        return ref
    base = (_read_json(ref, path, LORA_FILES[0]) or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"model {ref.name!r} is a LoRA that does not name its base model. Name both: "
            f"`model: {{name: BASE, lora: {ref.name}}}`."
        )
    if ref.lora is not None:
        raise UserError(
            f"model {ref.name!r} is a LoRA itself (of {base!r}), and another one is given as lora. Merge one "
            "of them into its base first."
        )
    return ref.model_copy(update={"name": base, "lora": str(path)})


def read_model_config(ref: ModelRef) -> dict[str, Any]:
    """The model's configuration as a plain mapping; neither torch nor transformers is imported, but for GGUF.

    Raises:
        UserError: no such model, or no readable configuration in it.
    """
    ref = with_base(ref)
    path = resolve_path(ref.name)
    if path is None or path.is_dir():
        config = _read_json(ref, path, "config.json")
        if config is None:
            raise UserError(_no_config(ref, path))
        return config
    from shared.models import gguf

    with user_errors(ref):
        return gguf.read_config(_gguf_file(ref, path))


def check_model_folder(ref: ModelRef) -> dict[str, Any] | None:
    """The configuration of a local model folder that has weights and a tokenizer too.

    None for hub ids and GGUF files, of which only loading can tell. What is added to the model is looked at,
    too. Imports neither torch nor transformers.

    Raises:
        UserError: no such file, one of another kind, or a file of a folder that is not there.
    """
    ref = with_base(ref)
    if ref.lora is not None:
        check_lora(ref.lora)
    if ref.chat_template is not None:
        _chat_template(ref.chat_template)
    path = resolve_path(ref.name)
    if path is None or path.is_file():
        if path is not None:
            _gguf_file(ref, path)
        check_quantization(ref, None)
        return None
    config = read_model_config(ref)
    check_quantization(ref, config)
    _require_weights(ref, path)
    _require_tokenizer(ref, path)
    return config


def weights_are_local(ref: ModelRef) -> bool:
    """Whether loading the model would download no weights. Imports neither torch nor transformers.

    Raises:
        UserError: a local path that does not exist.
    """
    ref = with_base(ref)
    path = resolve_path(ref.name)
    if path is not None:
        return path.is_file() or any((path / file).is_file() for file in WEIGHT_FILES)
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(ref.name, file, revision=ref.revision), str)
        for file in WEIGHT_FILES
    )


def generation_eos_ids(ref: ModelRef) -> tuple[int, ...]:
    """The end-of-sequence ids of the generation configuration, or else of the model's. Reads no weights.

    Raises:
        UserError: no such model.
    """
    ref = with_base(ref)
    path = resolve_path(ref.name)
    config = _read_json(ref, path, "generation_config.json") if path is None or path.is_dir() else None
    eos = (config or {}).get("eos_token_id")
    if eos is None:
        model_config = read_model_config(ref)
        eos = model_config.get("eos_token_id", model_config.get("text_config", {}).get("eos_token_id"))
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the reference's chat template if it gives one.

    Raises:
        UserError: no tokenizer files, or ones that cannot be read.
    """
    from transformers import AutoTokenizer

    ref = with_base(ref)
    path = resolve_path(ref.name)
    if path is not None and path.is_dir():
        _require_tokenizer(ref, path)
    with user_errors(ref):
        tokenizer = AutoTokenizer.from_pretrained(
            **_pretrained_arguments(ref, path), trust_remote_code=ref.trust_remote_code
        )
    if ref.chat_template is not None:
        tokenizer.chat_template = _chat_template(ref.chat_template)
    return tokenizer


def require_chat_template(tokenizer: PreTrainedTokenizerBase, ref: ModelRef) -> None:
    """Refuse a tokenizer that cannot render chats.

    Raises:
        UserError: names the model and what to add to the configuration.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"model {ref.name!r}: its tokenizer has no chat template (base models often have none). Give it "
            f"as `model: {{name: {ref.name}, chat_template: FILE.jinja}}` (for distill-eval: "
            "model.chat_template=FILE.jinja), or use an instruction-tuned model."
        )


def load_causal_lm(ref: ModelRef, *, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model on the CPU, in eval mode, with the reference's LoRA merged in.

    Args:
        ref: hub id, local folder, GGUF file or `pkg://PACKAGE/FILE`.
        dtype: of the weights; those that a model insists on keeping in float32 stay so.

    Raises:
        UserError: not found, no weights, weights that do not fill the model, an unknown architecture.
    """
    ref = with_base(ref)
    path = resolve_path(ref.name)
    if path is not None and path.is_file():
        from shared.models import gguf

        check_quantization(ref, None)
        with user_errors(ref):
            model: PreTrainedModel = gguf.load_model(_gguf_file(ref, path), dtype=dtype)
        return model if ref.lora is None else merge_lora(model, ref.lora)
    from transformers import AutoModelForCausalLM

    return _load_folder(ref, path, AutoModelForCausalLM, dtype)


def load_image_text_model(ref: ModelRef, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model with images and text in and text out, else as `load_causal_lm`.

    Args:
        ref: hub id or local folder.
        dtype: of the weights.

    Raises:
        UserError: not found, no weights, weights that do not fill the model, an unknown architecture.
    """
    from transformers import AutoModelForImageTextToText

    ref = with_base(ref)
    if ref.quantization is not None:
        raise UserError(
            f"model {ref.name!r}: quantization is of language models, and this one sees images. Remove it."
        )
    return _load_folder(ref, _folder(ref), AutoModelForImageTextToText, dtype)


def load_config(ref: ModelRef) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        UserError: none there, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    ref = with_base(ref)
    with user_errors(ref):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            **_pretrained_arguments(ref, _folder(ref)), trust_remote_code=ref.trust_remote_code
        )
    return config


def load_processor(ref: ModelRef) -> ProcessorMixin:
    """The model's processor, with the reference's chat template if it gives one.

    Raises:
        UserError: no processor files, ones that cannot be read, or a tokenizer alone.
    """
    from transformers import AutoProcessor

    ref = with_base(ref)
    path = _folder(ref)
    if path is not None and not any((path / file).is_file() for file in PROCESSOR_FILES):
        raise UserError(
            f"model {ref.name!r}: no processor in {path} (looked for {', '.join(PROCESSOR_FILES)}). Copy the "
            "processor files of the original model into the folder."
        )
    with user_errors(ref):
        processor: Any = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            **_pretrained_arguments(ref, path), trust_remote_code=ref.trust_remote_code
        )
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"model {ref.name!r}: {type(processor).__name__} does not prepare images and text. "
            "Give a vision-language model, or use distill-text."
        )
    if ref.chat_template is not None:
        processor.chat_template = _chat_template(ref.chat_template)
    return processor  # type: ignore[no-any-return]


def _load_folder(ref: ModelRef, path: Path | None, auto_class: Any, dtype: torch.dtype) -> PreTrainedModel:
    if path is not None:
        _require_weights(ref, path)
    if ref.quantization is not None:
        check_quantization(ref, read_model_config(ref))
    with user_errors(ref):
        # the attention is left to transformers: SDPA for every model that has it, eager for the rest
        model, report = auto_class.from_pretrained(
            **_pretrained_arguments(ref, path),
            **loading_arguments(ref, dtype),
            dtype=dtype,
            trust_remote_code=ref.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    _require_filled(ref, model, report)
    result: PreTrainedModel = settled(model) if ref.lora is None else merge_lora(plain(model), ref.lora)
    return result


def _folder(ref: ModelRef) -> Path | None:
    path = resolve_path(ref.name)
    if path is not None and path.is_file():
        raise UserError(
            f"model {ref.name!r} is a file. A vision-language model needs its processor beside its weights: "
            "give a model folder or a hub id."
        )
    return path


def _pretrained_arguments(ref: ModelRef, path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"pretrained_model_name_or_path": ref.name, "revision": ref.revision or "main"}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    return {"pretrained_model_name_or_path": str(_gguf_file(ref, path).parent), "gguf_file": path.name}


def _gguf_file(ref: ModelRef, path: Path) -> Path:
    if path.suffix != ".gguf":
        raise UserError(
            f"model {ref.name!r} is a file that is not GGUF. Give a model folder (config.json and "
            f"{' or '.join(WEIGHT_FILES)}), a .gguf file or a hub id."
        )
    return path


def _read_json(ref: ModelRef, folder: Path | None, file: str) -> dict[str, Any] | None:
    """A JSON file of a model folder (of the hub where `folder` is None); None where there is no such file."""
    if folder is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with user_errors(ref):
            try:
                path = Path(hf_hub_download(ref.name, file, revision=ref.revision))
            except LocalEntryNotFoundError:  # offline, and not in the cache
                raise
            except EntryNotFoundError:
                return None
    else:
        path = folder / file
        if not path.is_file():
            return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"model {ref.name!r}: {path} is not JSON: {error}. Copy the file again.") from None
    if not isinstance(values, dict):
        raise UserError(f"model {ref.name!r}: {path} holds {type(values).__name__}, not a JSON object.")
    return values


def _no_config(ref: ModelRef, folder: Path | None) -> str:
    if folder is None:
        return f"model {ref.name!r}: the repository has no config.json. Give one with a transformers model."
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"model {ref.name!r} is a folder of GGUF files. Name the file itself: {ggufs[0]}."
    return f"model {ref.name!r}: no config.json in {folder}. Give a model folder, a .gguf file or a hub id."


def _require_weights(ref: ModelRef, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(_no_config(ref, folder))
    if any((folder / file).is_file() for file in WEIGHT_FILES):
        return
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    advice = (
        f"It has {pickled[0]}, a pickle, which is not read: convert it to safetensors with "
        "`model.save_pretrained(folder)`."
        if pickled
        else "Copy the weights into the folder, or give another model."
    )
    raise UserError(
        f"model {ref.name!r}: no weights in {folder} (looked for {', '.join(WEIGHT_FILES)}). {advice}"
    )


def _require_tokenizer(ref: ModelRef, folder: Path) -> None:
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserError(
            f"model {ref.name!r}: no tokenizer in {folder} (looked for {', '.join(TOKENIZER_FILES)}). "
            "Copy the tokenizer files of the original model into the folder."
        )


def _require_filled(ref: ModelRef, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model {ref.name!r}: its files lack {len(missing)} weights of {type(model).__name__}, the first "
            f"{missing[0]!r}; they would be random. The checkpoint is incomplete or of another kind of model."
        )


def _chat_template(text: str) -> str:
    is_path = text.endswith((".jinja", ".jinja2")) and "\n" not in text and "{" not in text
    if not is_path:
        return text
    path = resolve_path(text)
    if path is None or not path.is_file():
        raise UserError(
            f"chat_template {text!r}: no such file. Give a path to a .jinja file, or the template itself."
        )
    return path.read_text(encoding="utf-8")
