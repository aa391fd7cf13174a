"""Gradients of a student that FSDP2 or ZeRO-3 shards over the processes of this group, for tests."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from builders import tiny_llama
from shared.config_models import StudentConfig
from shared.models.students import make_student
from shared.models.teachers import LocalTeacher
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.core import GlobalCounts, ResponseRows
from shared.objectives.objective import build_objective
from shared.training.distiller import Distiller
from shared.types import Encoded

VOCABULARY = SharedVocabulary(250, (0,))
CASES = (("lora", True), ("lora", False), ("full", True), ("full", False))  # method, tied head
MICRO_BATCHES = 4  # of the global batch


def micro_batch(index: int) -> tuple[Encoded, ResponseRows]:
    """A pair: two sequences of other lengths in every micro-batch."""
    generator = torch.Generator().manual_seed(index)
    lengths = (3 + index, 5)
    ids_BT = torch.randint(3, 250, (2, 4 + max(lengths)), generator=generator)
    mask_BT = (torch.arange(ids_BT.shape[1]) < 4 + torch.tensor(lengths)[:, None]).long()
    rows = [row * ids_BT.shape[1] + 3 + torch.arange(n) for row, n in enumerate(lengths)]
    rows_N = torch.cat(rows)
    response_N = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    targets_N = ids_BT.flatten()[rows_N + 1]
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    side_R = torch.arange(2)
    rows_of = ResponseRows(targets_N, response_N, side_R, torch.zeros(2, dtype=torch.long), side_R)
    return Encoded(inputs, rows_N, targets_N, response_N), rows_of


def counts() -> GlobalCounts:
    """Of the global batch."""
    by_side = [0.0, 0.0, 0.0]
    for index in range(MICRO_BATCHES):
        _, rows = micro_batch(index)
        for side, n in enumerate(torch.bincount(rows.response_N).tolist()):
            by_side[side] += n
    return GlobalCounts(float(MICRO_BATCHES), (by_side[0], by_side[1], by_side[2]))


def distiller_of(method: str, *, tied: bool) -> Distiller:
    """A tiny student with its loss; LoRA not at its start, where half of its gradient is 0."""
    settings = {"method": method} if method == "full" else {"method": method, "lora": {"dropout": 0.0}}
    config = StudentConfig.model_validate({"model": "teacher", **settings})
    student = make_student(config, tiny_llama(layers=3, tied=tied, seed=1), seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return Distiller(student, VOCABULARY, normalization="response").train()


def accumulate(module: nn.Module, teacher: LocalTeacher, indices: range, *, scale: float) -> None:
    """Backward passes of some micro-batches; processes exchange gradients after the last one."""
    for index in indices:
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(index == indices[-1])
        encoded, rows = micro_batch(index)
        output = module(
            encoded.inputs,
            encoded.rows_N,
            rows,
            teacher.signal([], encoded),
            objective=build_objective("distillm2", {}),
            alphas=lambda gap_R, cell_R: 0.1 + 0.05 * torch.tanh(gap_R),
            alpha_needs_gap=True,
            beta=0.6,
            counts=counts(),
        )
        loss = output.loss * scale
        if hasattr(module, "backward"):  # DeepSpeed's engine steps on its own account
            module.backward(loss)
            if index != indices[-1]:
                module.step()
        else:
            loss.backward()


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """All of them, whole, on every process."""
    found = {}
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def compare_with_one_process() -> None:
    """LoRA beside a tied head, and tied and untied heads that are trained."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for method, tied in CASES:
        _compare(method, tied=tied)
    dist.destroy_process_group()


def compare_zero3_with_one_process() -> None:
    """The same under DeepSpeed, whose partitioned head must be whole wherever the loss reads it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)
    rank, processes = dist.get_rank(), dist.get_world_size()
    teacher = LocalTeacher(tiny_llama(layers=4, seed=0), None, VOCABULARY)  # type: ignore[arg-type]
    for method, tied in CASES:
        alone = distiller_of(method, tied=tied)
        accumulate(alone, teacher, range(MICRO_BATCHES), scale=1.0)
        expected = gradients_of(alone)
        distiller = distiller_of(method, tied=tied)
        optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=0.0)
        mine = range(rank, MICRO_BATCHES, processes)
        engine, *_ = deepspeed.initialize(
            model=distiller,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": len(mine),
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        assert all(p.numel() == 0 for p in distiller.parameters()), "not partitioned"
        # it divides by the accumulation steps, which our loss has been already
        accumulate(engine, teacher, mine, scale=float(processes * len(mine)))
        found = {n: safe_get_full_grad(p) for n, p in distiller.named_parameters() if p.requires_grad}
        _assert_same(found, expected)
    dist.destroy_process_group()


def _compare(method: str, *, tied: bool) -> None:
    """Each process takes its share of the micro-batches; the gradients must be those of all."""
    teacher = LocalTeacher(tiny_llama(layers=4, seed=0), None, VOCABULARY)  # type: ignore[arg-type]
    alone = distiller_of(method, tied=tied)
    sharded = wrap(copy.deepcopy(alone))
    accumulate(alone, teacher, range(MICRO_BATCHES), scale=1.0)
    expected = gradients_of(alone)
    rank, processes = dist.get_rank(), dist.get_world_size()
    accumulate(sharded, teacher, range(rank, MICRO_BATCHES, processes), scale=float(processes))
    found = gradients_of(sharded)
    _assert_same(found, expected)


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 5, found.keys() ^ expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        difference = (found[name].view_as(gradient) - gradient).norm() / gradient.norm()
        assert difference < 1e-5, (name, float(difference))


def wrap(distiller: Distiller) -> nn.Module:
    """As accelerate does it on a GPU: a unit for each block, and the root with embedding and head."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    accelerator = SimpleNamespace(  # an Accelerator would not use the plugin on a CPU
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    wrapped: nn.Module = fsdp2_prepare_model(accelerator, distiller)
    blocks = [m for m in wrapped.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]
    assert len(blocks) == 3 and type(wrapped).__name__ == "FSDPDistiller"
    return wrapped
