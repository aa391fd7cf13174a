"""What is trained: all weights, or low-rank updates, of a model that may have been pruned first?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.config_models import LoraConfig, StudentConfig
from shared.errors import StoreError, UserError
from shared.models.pruning import prune_blocks
from shared.models.quantization import in_number_format, is_quantized, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ParameterCount(NamedTuple):
    """How many numbers a model has, tied ones counted once."""

    trainable: int
    total: int


def make_student(
    config: StudentConfig, base: PreTrainedModel, *, kept_layers: Sequence[int] | None = None, seed: int
) -> nn.Module:
    """The student made of a base model, which is left as it is.

    `full` gives a transformers model with every weight trainable, stored in `config.dtype`. `lora` and `dora`
    give a peft model: the base frozen in `config.dtype`, or quantised as it is (QLoRA), the updates in
    float32 (peft keeps them so beside a bfloat16 base).

    Args:
        config: method, LoRA settings and dtype.
        base: the starting model; shares no memory with the student, so it may be the teacher.
        kept_layers: blocks to keep, from `keep_layers`; all where None.
        seed: of the LoRA initialisation.

    Raises:
        UserError: LoRA modules that the model does not have, blocks that cannot be pruned.
    """
    student: Any = copy.deepcopy(base) if kept_layers is None else prune_blocks(base, kept_layers)
    in_number_format(student, getattr(torch, config.dtype))
    if config.method == "full":
        student.requires_grad_(True)
        return student  # type: ignore[no-any-return]
    return _with_lora(student, config.lora or LoraConfig(), dora=config.method == "dora", seed=seed)


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many of a model's weights are trained, and how many it has."""
    sizes = [
        # two weights of 4 bits in a byte
        (p.requires_grad, p.numel() * (2 if type(p).__name__ == "Params4bit" else 1))
        for p in model.parameters()
    ]
    return ParameterCount(sum(n for trained, n in sizes if trained), sum(n for _, n in sizes))


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name, tied ones once: what a checkpoint holds. Views, not copies."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` gave.

    Raises:
        StoreError: names, shapes or dtypes that are not those of this model's trained weights; nothing is
            changed then.
    """
    own = trainable_state(model)
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is not trained here" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {_kind(state[name])}, here {_kind(own[name])}"
        for name in own.keys() & state.keys()
        if _kind(state[name]) != _kind(own[name])
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise StoreError(
            f"the checkpoint does not fit the student ({len(problems)} differences: {shown}). It was written "
            "with another student configuration: restore that, or start in a new run folder."
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain transformers model with the LoRA merged into a copy of its weights.

    The trained model stays as it is, its LoRA separate. A model without LoRA is returned itself, not copied.
    """
    from peft import PeftModel, get_peft_model

    if not isinstance(model, PeftModel):
        return model  # type: ignore[return-value]
    whole: Any = copy.deepcopy(model)
    if is_quantized(model):  # peft would round the merged weights to 4 bits again
        config = copy.deepcopy(model.peft_config["default"])
        config.base_model_name_or_path = None  # it would warn that this is another base
        whole = get_peft_model(plain(whole.unload()), config)
        load_trainable_state(whole, trainable_state(model))
    result: PreTrainedModel = whole.merge_and_unload(safe_merge=True).requires_grad_(True)  # peft froze it
    return result


def _with_lora(base: Any, config: LoraConfig, *, dora: bool, seed: int) -> nn.Module:
    import peft

    modules = config.target_modules
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # only ever divided by r
        lora_dropout=config.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        use_dora=dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(base, settings)
        except ValueError as error:
            head = base.get_output_embeddings()
            linear = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in base.named_modules()
                    if isinstance(module, nn.Linear) and module is not head
                }
            )
            raise UserError(
                f"lora.target_modules {modules!r} cannot be used with {type(base).__name__}: {error} "
                f"Its linear layers: {', '.join(linear)}; or give all-linear."
            ) from None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
