"""A whole run on tiny models, for tests: prompts, model folders, configuration."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from builders import save_tiny_model
from shared.config import RunConfig
from shared.config_files import parse_config
from shared.progress import Speaker
from shared.run import Evaluate, Outcome, Run
from text_distill.adapter import TextAdapterKind
from text_distill.config import TextRunConfig

TRAIN, HELDOUT = 10, 3


def write_prompts(folder: Path) -> None:
    """Prompts of different lengths, some with reference answers."""
    for name, count in (("train", TRAIN), ("heldout", HELDOUT)):
        rows = [
            {"prompt": f"{name} {'word ' * (1 + 3 * i % 7)}{i}", "reference": f"answer {i}"}
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def tiny_config(folder: Path, *overrides: str, teacher: str = "teacher") -> RunConfig:
    """A run of two rounds of three steps on a four-block teacher; writes what is missing."""
    if not (folder / "train.jsonl").exists():
        write_prompts(folder)
    if not (folder / teacher).exists():
        save_tiny_model(folder / teacher, layers=4)
    text = f"""
        name: tiny
        output: {folder}/run
        teacher: {{model: {folder}/{teacher}, dtype: float32}}
        student: {{model: teacher, prune: {{drop_layers: [2]}}}}
        prompts:
          train: [{{path: {folder}/train.jsonl}}]
          heldout: [{{path: {folder}/heldout.jsonl}}]
        generation: {{max_new_tokens: 6, batch_tokens: 200}}
        training:
          {{rounds: 2, pairs_per_step: 4, micro_batch_tokens: 150, learning_rate: 5e-3, checkpoint_steps: 2}}
    """
    return parse_config(text, TextRunConfig, overrides)


def no_evaluation(run: Run) -> Outcome:
    """Leaves the evaluation stage out."""
    del run
    return Outcome({}, (), ())


def tiny_run(folder: Path, *overrides: str, evaluate: Evaluate = no_evaluation, shares: bool = False) -> Run:
    """A run that is ready to execute and says nothing."""
    config = tiny_config(folder, *overrides)
    return Run(config, TextAdapterKind(), evaluate=evaluate, speaker=Speaker(quiet=True), shares=shares)


class GradientsTaken(Exception):
    """Ends a run once its first gradients are known."""


def first_gradients(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The student's gradients, unclipped, at the first optimiser step of a run."""
    run = tiny_run(folder, "training.max_grad_norm=1e9", *overrides)
    gradients = {}

    def take(*_: object, **__: object) -> None:
        for name, parameter in run.session.trainee.student.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        raise GradientsTaken

    run.execute("generate")
    run.session.trainee.optimizer.step = take
    with contextlib.suppress(GradientsTaken):
        run._train(1, run._cached_groups or run._sample(1))
    return gradients


def save_first_gradients(folder: str, target: str, *overrides: str) -> None:
    """The same in a process of its own, which may be one of several; the first of them writes the file."""
    gradients = first_gradients(Path(folder), *overrides)
    if os.environ.get("RANK", "0") == "0":
        save_file({name: tensor.contiguous() for name, tensor in gradients.items()}, target)
