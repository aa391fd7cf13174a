"""How does a model hold its weights in 4 bits, and how does it become plain again?

`quantization: nf4` is bitsandbytes' NF4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the linear layers
but for the head in 4 bits, with one float32 scale for 64 weights; embeddings and norms as they are. Products
are computed of the rounded weights in the model's number format, so it is the plain model with other weights.
(bitsandbytes' 8 bits round what the weights are multiplied by as well, and what that gives depends on the
neighbours in a batch.)
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.models.references import ModelRef, resolve_path

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from shared.config_models import StudentConfig

NF4_BITS = 4 + 32 / 64  # a weight, with its share of a scale


def check_quantization(ref: ModelRef, model_config: Mapping[str, Any] | None) -> None:
    """Refuse a quantisation that cannot be. Imports neither torch nor transformers.

    Args:
        ref: what is to be loaded.
        model_config: the model's config.json, where it is known.

    Raises:
        UserError: a package that is missing, or a model that has no weights to round.
    """
    if ref.quantization is None:
        return
    asked = f"model {ref.name!r}: quantization: {ref.quantization}"
    path = resolve_path(ref.name)
    if path is not None and path.is_file():
        raise UserError(
            f"{asked} has no effect on a GGUF file. Remove it, or give a model folder or a hub id."
        )
    if model_config is not None and "quantization_config" in model_config:
        raise UserError(f"{asked} has no effect: its weights are stored quantised already. Remove it.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{asked} needs the package bitsandbytes, which is not installed. Install it with "
            "`pip install bitsandbytes`, or remove it."
        )


def check_quantized_student(student: StudentConfig) -> None:
    """Refuse what cannot be done with a student whose weights are quantised.

    Raises:
        UserError: they were to be trained or pruned.
    """
    if not student.uses_lora:
        raise UserError(
            f"student.method: {student.method}, and the model that the student starts from "
            f"({student.model.name!r}) is quantised, so its weights cannot be trained. Set student.method: "
            "lora, or start from a plain model."
        )
    if student.prune is not None:
        raise UserError(
            f"student.prune, and the model that the student starts from ({student.model.name!r}) is "
            "quantised. Prune a plain model first, in a run of its own, and start from that run's student."
        )


def loading_arguments(ref: ModelRef, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers is told to load the model quantised as its reference asks."""
    if ref.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    nf4: Any = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": nf4}


def is_quantized(model: nn.Module) -> bool:
    """Whether the model, or the base of its LoRA, has quantised weights."""
    from shared.models.heads import causal_lm_of

    return bool(getattr(causal_lm_of(model), "is_quantized", False))


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its quantised weights in one order for good.

    On processors with bfloat16 instructions bitsandbytes puts them into another order at the first pass, and
    then neither copies nor plain weights can be made of them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # mypy takes it for a tensor
    return model


def in_number_format(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in this format; quantised ones stay in that of their loading."""
    return model if is_quantized(model) else model.to(dtype)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy of a quantised one with its rounded weights in the model's number format.

    Raises:
        UserError: quantised in another way than 4 bits, which has no such weights.
    """
    if not is_quantized(model):
        return model
    refuse_other_bits(model)
    # it would say what it does, in the middle of a run
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    result: PreTrainedModel = copy.deepcopy(model).dequantize(dtype=model.dtype)  # type: ignore[no-untyped-call]
    result.is_loaded_in_4bit = False  # type: ignore[assignment]
    return result


def refuse_other_bits(model: nn.Module) -> None:
    """Refuse a quantised model that a LoRA cannot be merged into exactly.

    Raises:
        UserError: quantised in another way than 4 bits by bitsandbytes.
    """
    from shared.models.heads import causal_lm_of

    causal_lm = causal_lm_of(model)
    if is_quantized(model) and not getattr(causal_lm, "is_loaded_in_4bit", False):
        raise UserError(
            f"{type(causal_lm).__name__} is stored quantised in another way than 4 bits by "
            "bitsandbytes, so low-rank updates cannot be merged into it exactly. It can be a teacher; for a "
            "student or a base of a LoRA give the plain model, with `quantization: nf4` if it is large."
        )
