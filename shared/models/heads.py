"""Where do a model's hidden rows come from, and what turns them into its logits?

The loss applies the language-model head itself, to response rows only. What a model does to its logits after
the head's product (scaling, soft-capping) must therefore be read from its configuration; `check_head` proves
it right against the model's own logits, or refuses.

Shapes in names: B sequences, T tokens of a padded sequence, N rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.models.pair_attention import pair_mask
from shared.objectives.head import Head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from shared.models.vocabulary import SharedVocabulary

# What the models of transformers do to logits, by configuration key (found in its modeling files, 5.23).
MULTIPLYING_KEYS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDING_KEYS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The same key with the other meaning: HyperCLOVA X multiplies by what Granite divides by.
MULTIPLIED_LOGITS_SCALING = frozenset({"hyperclovax"})
# Keys that exist in the configuration and are not used by the model.
UNUSED_KEYS = {"mpt": frozenset({"logit_scale"})}

# Largest allowed difference, relative to the largest logit: the model rounds its logits, we keep float32.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside a peft wrapper (its LoRA layers stay active), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that gives `last_hidden_state`, LoRA layers included.

    Raises:
        UserError: a model that is not split into backbone and head.
    """
    causal_lm = causal_lm_of(model)
    backbone: nn.Module = causal_lm.base_model
    if backbone is causal_lm or causal_lm.get_output_embeddings() is None:
        raise UserError(
            f"{type(causal_lm).__name__} is not a backbone with a language-model head, so it cannot be "
            "distilled token by token. Use a model of a ...ForCausalLM or ...ForConditionalGeneration class."
        )
    return backbone


def hidden_rows(model: nn.Module, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
    """The hidden states (N, D) that the head gets, at some rows of one forward pass.

    Args:
        model: a causal language model.
        inputs: its forward arguments. `segment_ids` instead of a mask: several responses share a sequence and
            do not see each other. With `image_entries`, images enter once and are shared: the entries of
            `get_image_features` that the sequences take, in order.
        rows_N: indices into the flattened (B * T) positions.
    """
    arguments: dict[str, Any] = dict(inputs)
    if "segment_ids" in arguments:
        arguments["attention_mask"] = pair_mask(causal_lm_of(model), arguments.pop("segment_ids"))
    backbone = backbone_of(model)
    if "image_entries" in arguments:
        arguments = _look_once(backbone, arguments)
    hidden_BTD: Tensor = backbone(**arguments, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1)[rows_N]


def head_of(model: nn.Module, shared: SharedVocabulary | None) -> Head:
    """The head that turns the backbone's hidden rows into logits, cut to the shared vocabulary if given.

    Weights are the model's own tensors, so gradients reach them. LoRA on the head itself would be missed,
    so it is refused.

    Raises:
        UserError: LoRA on the output layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    causal_lm = causal_lm_of(model)
    output = causal_lm.get_output_embeddings()
    if isinstance(output, BaseTunerLayer | ModulesToSaveWrapper):
        raise UserError(
            "LoRA on the language-model head is not supported. Take it out of lora.target_modules "
            "(all-linear leaves the head alone)."
        )
    config = causal_lm.config.get_text_config(decoder=True)
    weight_VD = output.weight
    excluded = None
    if shared is not None and shared.excluded_ids:
        excluded = torch.tensor(shared.excluded_ids, dtype=torch.long, device=weight_VD.device)
    return Head(
        weight_VD,
        getattr(output, "bias", None),
        logit_scale=logit_scale(config),
        softcap=softcap(config),
        width=None if shared is None else shared.width,
        excluded_ids=excluded,
    )


def logit_width(model: nn.Module) -> int:
    """How many columns the model's logits have; at least its tokenizer's size, more if padded."""
    return int(causal_lm_of(model).get_output_embeddings().weight.shape[0])


@torch.no_grad()
def check_head(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Prove on a batch that our head on the backbone's rows gives the model's own logits (contract 4).

    Padding positions are not compared. Leaves the model's mode as it was.

    Raises:
        UserError: they differ; the model does something to its logits that is not known here.
    """
    was_training = model.training
    model.eval()
    try:
        expected_BTV = model(**inputs, use_cache=False).logits
        hidden_BTD = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    mask_BT = inputs.get("attention_mask")
    rows_BT = torch.ones_like(hidden_BTD[..., 0], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    hidden_ND = hidden_BTD[rows_BT]
    ours_NV = head_of(model, None).logits(hidden_ND)
    expected_NV = expected_BTV[rows_BT].to(ours_NV.dtype)
    scale = expected_NV.abs().max().clamp(min=1e-6)
    worst = ((ours_NV - expected_NV).abs().max() / scale).item()
    tolerance = TOLERANCES[hidden_ND.dtype]
    if not worst <= tolerance:  # also true for NaN
        causal_lm = causal_lm_of(model)
        known = MULTIPLYING_KEYS + DIVIDING_KEYS + SOFTCAP_KEYS
        raise UserError(
            f"the logits of {type(causal_lm).__name__} are not its head applied to its hidden states: they "
            f"differ by {worst:.2g} of the largest logit (allowed {tolerance:g}). It does something to its "
            f"logits that is not known here (known configuration keys: {', '.join(known)}), so distilling it "
            "would be wrong. Use another model."
        )


def _look_once(backbone: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with the features of each distinct image in the place of its pixels: one pass of the tower."""
    # an older forward would swallow the features in its **kwargs
    if "mm_encoder_outputs" not in inspect.signature(backbone.forward).parameters:
        raise UserError(
            f"{type(backbone).__name__} of transformers {version('transformers')} takes no image features "
            "that were computed before, so it would not see the images that responses share. Install "
            "transformers>=5.18; where the model has no such argument there either, set "
            "training.pair_layout: joint or use another model."
        )
    inputs = dict(inputs)
    entries_I = inputs.pop("image_entries")

    def shared(features: Any) -> Any:  # a tensor with an entry a row, or a list of tensors
        return features[entries_I] if isinstance(features, Tensor) else [features[i] for i in entries_I]

    names = inspect.signature(backbone.get_image_features).parameters
    pixels = {name: inputs.pop(name) for name in list(inputs) if name in names}
    seen = backbone.get_image_features(**pixels, return_dict=True)
    seen.pooler_output = shared(seen.pooler_output)
    if getattr(seen, "deepstack_features", None) is not None:
        seen.deepstack_features = [shared(layer) for layer in seen.deepstack_features]
    inputs["mm_encoder_outputs"] = {"image": seen}
    return inputs


def logit_scale(config: PreTrainedConfig) -> float:
    """What a language model multiplies its logits by."""
    scale = 1.0
    unused = UNUSED_KEYS.get(config.model_type, frozenset())
    for key in (*MULTIPLYING_KEYS, *DIVIDING_KEYS):
        value = getattr(config, key, None)
        if value is None or key in unused:
            continue
        divides = key in DIVIDING_KEYS and config.model_type not in MULTIPLIED_LOGITS_SCALING
        scale = scale / value if divides else scale * value
    return float(scale)


def softcap(config: PreTrainedConfig) -> float | None:
    """What a language model caps its logits at, softly, after scaling."""
    values = [getattr(config, key) for key in SOFTCAP_KEYS if getattr(config, key, None) is not None]
    return float(values[0]) if values else None
