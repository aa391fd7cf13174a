"""How much memory, disk and arithmetic does a run take? From its models' shapes, without their weights.

Every figure is a count of the models as they are built (on torch's meta device, where weights take no
memory) or one of these products:

    weights, gradients      bytes per parameter of their number format
    Adam's moments          two of each trained parameter, in its format
    activations             what autograd keeps of one micro-batch, counted on the meta device; attention
                            matrices are left out, because no fused kernel keeps them
    loss                    the chunk of logits that the fused loss may hold, and a float32 gradient of a
                            trained head
    keys and values         2 · layers · width of keys · bytes, for each token of a sampling batch
    arithmetic              2 operations a parameter and token forward (Kaplan et al. 2020, arXiv 2001.08361,
                            2.1), 2 more backward, and 2 for each trained parameter; a vision tower counts as
                            if every token passed it
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.config import RunConfig
from shared.models.heads import backbone_of, causal_lm_of
from shared.models.quantization import NF4_BITS
from shared.models.students import trainable_parameters
from shared.objectives.chunks import CPU_BUFFER_BYTES, GPU_BUFFER_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shared.models.references import ModelRef

GIB = 2**30
TEXT_BYTES_PER_TOKEN = 8  # of a stored response: an id of 4 bytes, and about 4 letters, before compression
FORWARD, BACKWARD_TO_INPUTS, BACKWARD_TO_WEIGHTS = 2.0, 2.0, 2.0  # operations a parameter and token


class Shape(NamedTuple):
    """What a model is to memory and arithmetic."""

    parameters: int
    trained: int
    body: int  # parameters that every token passes: without the tables of embeddings and head
    head: int  # of the head
    head_trained: bool
    kv_bytes: int  # keys and values of one token
    weight_bytes: int
    trained_bytes: int  # of the trained weights
    context: int | None  # longest sequence, in tokens
    width: int  # columns of the logits

    @property
    def forward(self) -> float:
        """Operations of one token, the head's not counted."""
        return FORWARD * self.body

    @property
    def training(self) -> float:
        """Operations of one token forward and backward."""
        to_weights = BACKWARD_TO_WEIGHTS * min(self.trained, self.body)
        return self.forward + BACKWARD_TO_INPUTS * self.body + to_weights


def shape_of(model: nn.Module, ref: ModelRef | None = None) -> Shape:
    """The shape of a model, which may be on the meta device or wrapped by peft.

    Args:
        model: with plain weights.
        ref: says whether those of its frozen linear layers will be in 4 bits.
    """
    causal_lm = causal_lm_of(model)
    config = causal_lm.config.get_text_config(decoder=True)
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    count = trainable_parameters(model)
    tables = embedding.numel() + (head.numel() if head is not embedding else 0)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rounded = {
        module.weight
        for module in model.modules()
        if ref is not None and ref.quantization and isinstance(module, nn.Linear)
        if module.weight is not head and not module.weight.requires_grad
    }
    sizes = [
        (p.requires_grad, int(p.numel() * (NF4_BITS / 8 if p in rounded else p.element_size())))
        for p in model.parameters()
    ]
    return Shape(
        parameters=count.total,
        trained=count.trainable,
        body=count.total - tables,
        head=head.numel(),
        head_trained=head.requires_grad,
        kv_bytes=2 * config.num_hidden_layers * heads * head_width * embedding.element_size(),
        weight_bytes=sum(size for _, size in sizes),
        trained_bytes=sum(size for trained, size in sizes if trained),
        context=getattr(config, "max_position_embeddings", None),
        width=head.shape[0],
    )


def outline(ref: ModelRef, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a reference on the meta device: its configuration is read, its weights are not.

    Raises:
        UserError: no configuration, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from shared.models.load_errors import user_errors
    from shared.models.loading import load_config, read_model_config
    from shared.models.references import resolve_path

    path = resolve_path(ref.name)
    with user_errors(ref), torch.device("meta"):
        if path is not None and path.is_file():
            values = read_model_config(ref)
            config: Any = AutoConfig.for_model(**values)
        else:
            config = load_config(ref)
        sees = hasattr(config, "vision_config")
        auto_class: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        # parts that a model insists on making elsewhere go there, too
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype).eval().to("meta")
    return model


def activation_bytes(
    model: nn.Module, tokens: int, length: int, *, autocast: bool, checkpointing: bool
) -> int:
    """What autograd keeps of the language model's pass over a micro-batch, counted on the meta device.

    A vision tower's are not counted. With checkpointing it is one block's, and the inputs of all blocks.

    Args:
        model: on the meta device, with `requires_grad` as in training.
        tokens: padded ones of the micro-batch.
        length: of its sequences.
        autocast: whether the forward pass runs in bfloat16.
        checkpointing: whether blocks are computed again in the backward pass.
    """
    backbone: Any = backbone_of(model)
    backbone = getattr(backbone, "language_model", backbone)
    embedding = causal_lm_of(model).get_input_embeddings().weight
    rows = max(1, round(tokens / length))
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    inputs = torch.empty(
        rows, length, embedding.shape[1], dtype=embedding.dtype, device="meta", requires_grad=True
    )
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tensor.shape[-2:] != (length, length):
            kept[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    was_training = model.training
    model.train()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        output = backbone(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    del output
    model.train(was_training)
    total = sum(int(storage.nbytes()) for storage in kept.values())
    if not checkpointing:
        return total
    blocks: int = causal_lm_of(model).config.get_text_config(decoder=True).num_hidden_layers
    return total // blocks + blocks * inputs.nbytes


def memory(
    teacher: Shape | None,
    student: Shape,
    *,
    activations: int,
    kv_tokens: int,
    copy_bytes: int,
    on_cpu: bool,
) -> Mapping[str, Mapping[str, int]]:
    """Bytes by part: what lies there always, what training adds, what sampling adds.

    Args:
        teacher: None where the run has none.
        student: as it is trained.
        activations: of a micro-batch.
        kv_tokens: of a sampling batch.
        copy_bytes: of the merged or converted student that samples; 0 where it is the trained one itself.
        on_cpu: whether the loss works in a processor's or a GPU's chunks.
    """
    always = {"student, weights": student.weight_bytes}
    if teacher is not None:
        always = {"teacher, weights": teacher.weight_bytes, **always}
    always["student, Adam's moments"] = 2 * student.trained_bytes
    cache = max(teacher.kv_bytes if teacher is not None else 0, student.kv_bytes)
    return {
        "always": always,
        "training": {
            "gradients": student.trained_bytes,
            "activations": activations,
            "loss chunk": CPU_BUFFER_BYTES if on_cpu else GPU_BUFFER_BYTES,
            **({"head gradient": 4 * student.head} if student.head_trained else {}),
        },
        "sampling": {
            "keys and values": cache * kv_tokens,
            **({"student, copy that samples": copy_bytes} if copy_bytes else {}),
        },
    }


def peak(parts: Mapping[str, Mapping[str, int]]) -> int:
    """The larger of training and sampling, with what lies there always."""
    sums = {name: sum(sizes.values()) for name, sizes in parts.items()}
    return sums["always"] + max(sums["training"], sums["sampling"])


def disk(config: RunConfig, student: Shape, *, responses: int, export_bytes: int) -> dict[str, int]:
    """Bytes in the run's folder at the end, at most.

    Kept are the start, the round's start and the best student, and the last with its moments; while a
    checkpoint is written, the one before it is still there.

    Args:
        config: the run.
        student: as it is trained.
        responses: of all rounds, held-out ones included.
        export_bytes: of the plain model.
    """
    checkpoint = 3 * student.trained_bytes  # weights and two moments
    return {
        "checkpoints": 3 * student.trained_bytes + 2 * checkpoint,
        "responses": responses * config.generation.max_new_tokens * TEXT_BYTES_PER_TOKEN,
        "export": export_bytes + (student.trained_bytes if config.student.uses_lora else 0),
    }
