"""Which parts of a vision-language model are trained, and how: tower, projector, language model?

A part is frozen, trained in full, or gets low-rank updates. Weights that a model carries without using (the
blocks behind LLaVA's layer, a pooling head) are found by a backward pass through the image features and stay
frozen: an optimiser would decay them, and processes that train together would wait for their gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from shared.config_models import LoraConfig
from shared.config_section import Section
from shared.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Part = Literal["tower", "projector", "language_model"]
Method = Literal["frozen", "lora", "full"]

# The first that is found in a weight's name says its part; everything else is the language model.
PLACES: tuple[tuple[str, Part], ...] = (
    (r"\bmulti_modal_projector\b|\bconnector\b|\bimage_newline\b", "projector"),
    (r"\bvisual\.(merger|deepstack_merger_list)\b", "projector"),
    (r"\bvision_tower\b|\bvision_model\b|\bvisual\b", "tower"),
)
FEATURES = ("pooler_output", "deepstack_features")  # what of `get_image_features` the language model sees


class PartsConfig(Section):
    """What is done with each part; as in LLaVA's own training, the tower is frozen."""

    tower: Method = "frozen"
    projector: Method = "full"
    language_model: Method = "full"

    @model_validator(mode="after")
    def _trains_something(self) -> PartsConfig:
        if {self.tower, self.projector, self.language_model} == {"frozen"}:
            raise ValueError("every part is frozen; train at least one")
        return self


def part_of(name: str) -> Part:
    """The part that a weight or module belongs to, by its name in the model."""
    return next((part for pattern, part in PLACES if re.search(pattern, name)), "language_model")


def apply_parts(
    model: nn.Module,
    parts: PartsConfig,
    *,
    vision_inputs: Mapping[str, Tensor],
    lora: LoraConfig | None = None,
    dora: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Make a model trainable part by part, in place.

    Args:
        model: of transformers, with `get_image_features`.
        parts: what is done with each part.
        vision_inputs: arguments of `get_image_features` for any picture.
        lora: of the parts with `lora`.
        dora: whether their updates are DoRA.
        seed: of the updates' initialisation.

    Returns:
        The model itself, or a peft model around it where a part has `lora`.

    Raises:
        UserError: a part that the model does not have, LoRA modules that it does not have there.
    """
    methods: dict[Part, Method] = {
        "tower": parts.tower,
        "projector": parts.projector,
        "language_model": parts.language_model,
    }
    found = {part_of(name) for name, _ in model.named_parameters()}
    if absent := sorted(part for part in methods if part not in found):
        raise UserError(
            f"{type(model).__name__} has no {' and no '.join(absent)} by a name that is known here. "
            "Use a LLaVA-style model."
        )
    unused = _unused(model, vision_inputs)
    trained = {
        parameter
        for name, parameter in model.named_parameters()
        if methods[part_of(name)] == "full" and parameter not in unused
    }
    if "lora" in methods.values():
        adapted = {part for part, method in methods.items() if method == "lora"}
        model = _with_lora(model, adapted, unused, lora or LoraConfig(), dora=dora, seed=seed)
        trained |= {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    return model


def _with_lora(
    model: Any, parts: set[Part], unused: set[nn.Parameter], lora: LoraConfig, *, dora: bool, seed: int
) -> nn.Module:
    import peft
    import torch

    wanted = lora.target_modules
    layers = {
        name: layer
        for name, layer in _linear_layers(model)
        if part_of(name) in parts and layer.weight not in unused
    }
    if wanted != "all-linear":
        layers = {name: layer for name, layer in layers.items() if name.endswith(wanted)}
    if missing := sorted(part for part in parts if not any(part_of(name) == part for name in layers)):
        there = {name.rpartition(".")[2] for name, _ in _linear_layers(model) if part_of(name) in missing}
        advice = (
            f"Linear layers there: {', '.join(sorted(there))}; or give all-linear."
            if there
            else "There are no linear layers: train that part in full, or freeze it."
        )
        raise UserError(
            f"lora.target_modules {wanted!r} has nothing to adapt in {' and '.join(missing)} of "
            f"{type(model).__name__}. {advice}"
        )
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # only ever divided by r
        lora_dropout=lora.dropout,
        target_modules=list(layers),
        use_dora=dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings)


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Linear layers whose forward is used: not the head, and none inside a `nn.MultiheadAttention`."""
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Linear | Conv1D)
            and not isinstance(module, NonDynamicallyQuantizableLinear)
            and module is not head
        ):
            yield name, module


def _unused(model: Any, vision_inputs: Mapping[str, Tensor]) -> set[nn.Parameter]:
    """The weights of tower and projector that no image feature depends on."""
    import torch

    seen = [(n, p) for n, p in model.named_parameters() if part_of(n) != "language_model"]
    was = {parameter: parameter.requires_grad for _, parameter in seen}
    with torch.enable_grad():
        for _, parameter in seen:
            parameter.requires_grad_(True)
        features = model.get_image_features(**vision_inputs)
        total = sum(
            tensor.float().square().sum()
            for key in FEATURES
            for tensor in _tensors(getattr(features, key, None))
        )
        assert isinstance(total, torch.Tensor), f"{type(model).__name__} gives no image features"
        gradients = torch.autograd.grad(total, [parameter for _, parameter in seen], allow_unused=True)
    for parameter, wanted in was.items():
        parameter.requires_grad_(wanted)
    return {p for (_, p), gradient in zip(seen, gradients, strict=True) if gradient is None}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif value is not None:
        yield value
