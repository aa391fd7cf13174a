"""What is the folder of a LoRA, and how does it become part of its base model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.models.load_errors import user_errors
from shared.models.references import ModelRef, resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_lora(name: str) -> None:
    """Refuse a local folder that holds no LoRA. Imports neither torch nor transformers.

    Raises:
        UserError: files that are not there.
    """
    folder = resolve_path(name)
    absent = [] if folder is None else [file for file in LORA_FILES if not (folder / file).is_file()]
    if absent:
        raise UserError(
            f"lora {name!r}: no {' and no '.join(absent)} in {folder}. Give a folder that peft wrote."
        )


def merge_lora(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with a LoRA of a local folder or of the hub merged in, as trainable as it was.

    Raises:
        UserError: files that are not there, or a LoRA of another model.
    """
    from peft import PeftModel

    ref = ModelRef(name=name)
    folder = resolve_path(name)
    if folder is None:
        from huggingface_hub import snapshot_download

        with user_errors(ref):
            folder = Path(snapshot_download(name, allow_patterns=list(LORA_FILES)))
    check_lora(str(folder))
    wants_gradient = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    with user_errors(ref):
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(
            safe_merge=True
        )
    for key, parameter in merged.named_parameters():  # peft froze the base
        parameter.requires_grad_(key in wants_gradient)
    return merged
