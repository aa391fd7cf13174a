"""How many pairs a second does a whole training step take? Against TRL's GKD, and against our own plain way.

    python benchmarks/train_step.py [--short] [--out FILE] [--threads N] [--rounds N] [--float64]

A step is the teacher's pass, the student's forward and backward pass, and AdamW. Objective and normalisation
are the same for all: generalised JSD at one half on both responses, a mean over tokens (GKD's published
loss), so that the gradients must be equal. SmolLM2-135M-Instruct is the teacher and 22 of its 30 blocks are
the student, float32, random tokens. Contestants take turns (A B A B ...) in one process; a ratio is the
median of the rounds' ratios. `--float64` compares the gradients with those of the same models in float64,
too, to tell whose the difference is.

    joint           this project: a pair is one sequence, its prompt computed once; the fused loss
    separate_full   this project's other layout, and full logits at response rows
    trl             `trl.experimental.gkd.GKDTrainer.training_step`, lmbda 0, both responses as sequences

TRL (1.16 or newer) is not a dependency: `pip install trl` beside this project, or it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loss_core import DEVICE, has_trl, machine, now
from pair_layout import FULL, MODEL, SHORT, Case, Model, batch_of, cases_here, seconds
from torch import Tensor, nn

from shared.models.loading import load_tokenizer
from shared.models.vocabulary import SharedVocabulary
from shared.objectives import core
from shared.objectives.core import GlobalCounts
from shared.objectives.objective import build_objective
from shared.training import distiller as distiller_module

Step = Callable[[], None]


def our_step(model: Model, case: Case, *, joint: bool) -> Step:
    """This project's step, without the optimiser."""
    encoded, rows = batch_of(case, "joint" if joint else "separate")
    teacher_rows, student_rows = (case.pairs * length for length in case.responses)
    counts = GlobalCounts(float(case.pairs), (float(teacher_rows), float(student_rows), 0.0))
    objective = build_objective("gkd", {"phi": student_rows / (teacher_rows + student_rows), "omega": 0.5})
    loss = partial(core.objective_loss, backend="fused" if joint else "plain")

    def step() -> None:
        distiller_module.objective_loss = loss  # type: ignore[assignment]
        signal = model.teacher.signal([], encoded)
        output = model.distiller(
            encoded.inputs, encoded.rows_N, rows, signal,
            objective=objective, alphas=None, alpha_needs_gap=False, beta=0.5, counts=counts,
        )  # fmt: skip
        output.loss.backward()

    return step


def trl_step(model: Model, case: Case, folder: str) -> Step:
    """TRL's step on the same tensors, without the optimiser."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    encoded, rows = batch_of(case, "separate")
    input_ids_BT, mask_BT = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
    labels = torch.full_like(input_ids_BT.flatten(), -100)
    labels[encoded.rows_N + 1] = rows.targets_N  # TRL shifts
    arguments = GKDConfig(
        output_dir=folder,
        lmbda=0.0,
        beta=0.5,
        temperature=1.0,
        report_to=[],
        use_cpu=DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(input_ids_BT),
        disable_dropout=True,
    )
    trainer = GKDTrainer(
        model=model.distiller.student,
        teacher_model=model.teacher.model,
        args=arguments,
        data_collator=lambda rows: rows,
        train_dataset=Dataset.from_list([{"x": 0}]),
        processing_class=load_tokenizer(MODEL),
    )
    inputs = {"input_ids": input_ids_BT, "attention_mask": mask_BT, "labels": labels.view_as(input_ids_BT)}
    tokens = torch.tensor(len(rows.targets_N))

    def step() -> None:
        trainer.training_step(trainer.model, dict(inputs), num_items_in_batch=tokens)

    return step


def gradient(module: nn.Module, step: Step) -> Tensor:
    """One step's, as a vector."""
    module.zero_grad(set_to_none=True)
    step()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def float64_gradient(model: Model, case: Case) -> Tensor:
    """Of the same weights and tokens; transformers' norms round to float32 even there."""
    for module in (model.teacher.model, model.distiller):
        module.double()
    found = gradient(model.distiller.student, our_step(model, case, joint=False))
    for module in (model.teacher.model, model.distiller):
        module.float()  # as they were: float32 in float64 loses nothing
    return found


def measure(model: Model, case: Case, rounds: int, folder: str, *, float64: bool) -> dict[str, Any]:
    """All contestants in turns."""
    references = {"float64": float64_gradient(model, case)} if float64 else {}
    steps = {
        "joint": our_step(model, case, joint=True),
        "separate_full": our_step(model, case, joint=False),
    }
    if has_trl():
        steps["trl"] = trl_step(model, case, folder)
    student = model.distiller.student
    references["separate_full"] = gradient(student, steps["separate_full"])
    apart = {}
    for name in steps:  # warms up, too
        found = references[name] if name in references else gradient(student, steps[name])
        for other, reference in references.items():
            if other != name:
                difference = (found - reference).norm() / reference.norm()
                apart[f"{name} and {other}"] = float(f"{float(difference):.1e}")
    del references, reference, found
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)

    def whole(step: Step) -> None:
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    student.zero_grad(set_to_none=True)
    whole(steps["joint"])  # makes the moments
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(lambda s=step: whole(s)))
    speedup = {
        name: statistics.median(a / b for a, b in zip(times[name], times["joint"], strict=True))
        for name in list(steps)[1:]
    }
    return {
        **case._asdict(),
        "pairs_per_second": {n: round(case.pairs / statistics.median(t), 3) for n, t in times.items()},
        "joint_is_faster_than": {name: round(ratio, 2) for name, ratio in speedup.items()},
        "seconds_by_round": {name: [round(t, 2) for t in values] for name, values in times.items()},
        "gradient_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="two cases")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--float64", action="store_true", help="compare gradients with float64")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "machine": machine(arguments.threads),
        "rounds": arguments.rounds,
        "trl": None,
        "cases": [],
    }
    if has_trl():
        from importlib.metadata import version

        results["trl"] = version("trl")
    model = Model(torch.float32, SharedVocabulary(49152, ()))  # TRL leaves no ids out
    began = now()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases_here(SHORT if arguments.short else FULL[:3]):
            measured = measure(model, case, arguments.rounds, folder, float64=arguments.float64)
            results["cases"].append(measured)
            print(json.dumps(results["cases"][-1]), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{now() - began:.0f} s")


if __name__ == "__main__":
    main()
