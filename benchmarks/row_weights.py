"""What do row weights and coupling change? Measured on a mixture of three small tasks, over seeds.

    python benchmarks/row_weights.py [--short] [--seeds 0 1 2] [--work FOLDER] [--out FILE]

instruction   say letters backwards: one word
math          add three numbers step by step; the last line is the sum
code          the numbers of a loop, one a line

A teacher learns all three from their answers (`sft`), and so does, a little, a student of half its blocks. It
is then distilled from that teacher with each setting below, everything else being equal. Per task: the share
of greedy held-out answers that are right to the last letter, and of those whose last line is. No model is
downloaded; what is finished in the work folder is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow.parquet
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from text_distill import distill

SETTINGS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "segment": {"objective.row_weights.level": "segment"},
    "response": {"objective.row_weights": {"level": "response", "tau": 0.1}},
    "tasks": {"objective.row_weights.tasks": {"gamma": 1.0}},
    "coupling": {
        "objective.coupling": {
            "math": {"teacher": {"divergence": "kl", "weight": 3}, "student": {"weight": 3}}
        }
    },
}
LEARNING_RATE = 1e-3
GENERATION = {"max_new_tokens": 32, "batch_tokens": 16384}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<end>", "<user>", "<assistant>")


def instruction(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choices(LETTERS, k=rng.randint(3, 7)))
    return word, word[::-1]


def math(rng: random.Random) -> tuple[str, str]:
    one, two, three = (rng.randint(10, 99) for _ in range(3))
    return (
        f"{one}+{two}+{three}",
        f"{one}+{two}={one + two}\n{one + two}+{three}={one + two + three}\n{one + two + three}",
    )


def code(rng: random.Random) -> tuple[str, str]:
    start, step, count = rng.randint(0, 400), rng.randint(1, 9), rng.randint(2, 5)
    return f"{count} from {start} by {step}", "\n".join(str(start + i * step) for i in range(count))


TASKS: Mapping[str, Callable[[random.Random], tuple[str, str]]] = {
    "instruction": instruction,
    "math": math,
    "code": code,
}


def write_rows(path: Path, per_task: int, seed: int, *, without: Collection[str] = ()) -> dict[str, str]:
    """Different prompts of every task; returns the answer to each id."""
    rng, rows, seen = random.Random(seed), [], set(without)
    for task, make in TASKS.items():
        for number in range(per_task):
            prompt, answer = make(rng)
            while prompt in seen:
                prompt, answer = make(rng)
            seen.add(prompt)
            rows.append(
                {"id": f"{task}-{path.stem}-{number}", "task": task, "prompt": prompt, "reference": answer}
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {row["id"]: row["reference"] for row in rows}


def save_untrained(folder: Path, width: int, blocks: int) -> None:
    """A Llama that reads single characters."""
    tokens = [*SPECIAL, *sorted({*LETTERS, *"0123456789+= \n"})]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            max_position_embeddings=96,
            initializer_range=width**-0.5,  # 0.02 learns much slower at so small a width
            eos_token_id=SPECIAL.index("<end>"),
            pad_token_id=SPECIAL.index("<pad>"),
        )
    ).save_pretrained(folder)


def accuracies(run: Path, role: str, answers: Mapping[str, str]) -> dict[str, float]:
    """The share of right answers and right last lines of each task."""
    rows = [
        row
        for part in sorted((run / "evaluation" / "responses" / f"{role}-greedy").glob("*.parquet"))
        for row in pyarrow.parquet.read_table(part, columns=["sample_id", "text"]).to_pylist()
    ]
    assert {row["sample_id"] for row in rows} == set(answers), "not every held-out prompt was answered"
    found = dict[str, float]()
    for task in TASKS:
        pairs = [
            (row["text"], answers[row["sample_id"]]) for row in rows if row["sample_id"].startswith(task)
        ]
        found[task] = statistics.fmean(text == answer for text, answer in pairs)
        found[f"{task}, last line"] = statistics.fmean(
            text.rsplit("\n")[-1] == answer.rsplit("\n")[-1] for text, answer in pairs
        )
    return found


def learn(work: Path, name: str, student: Mapping[str, Any], prompts: Mapping[str, Any], rounds: int) -> str:
    """A model that learns the answers; returns its folder."""
    config = {
        "name": name,
        "output": str(work / name),
        "student": {"dtype": "float32", **student},
        "objective": {"name": "sft"},
        "prompts": prompts,
        "seed": 0,
        "generation": GENERATION,
        "training": {
            "rounds": rounds,
            "pairs_per_step": 64,
            "micro_batch_tokens": 4096,
            "learning_rate": LEARNING_RATE,
        },
    }
    return str(distill(config).student)


def measure(work: Path, seeds: Sequence[int], *, short: bool) -> dict[str, Any]:
    """Every setting with every seed; what is finished under `work` is not run again."""
    work.mkdir(parents=True, exist_ok=True)
    heldout = write_rows(work / "heldout.jsonl", 20 if short else 200, seed=1)
    asked = {json.loads(line)["prompt"] for line in (work / "heldout.jsonl").read_text().splitlines()}
    write_rows(work / "train.jsonl", 40 if short else 4000, seed=2, without=asked)
    if not (work / "untrained").exists():
        save_untrained(work / "untrained", width=128, blocks=4)
    train = {"path": str(work / "train.jsonl"), "shuffle": True}
    prompts = {"train": [train], "heldout": [{"path": str(work / "heldout.jsonl")}]}
    teacher = learn(work, "teacher", {"model": str(work / "untrained")}, prompts, 1 if short else 10)
    half = {"model": teacher, "prune": {"keep_every": 2}}
    start = learn(work, "start", half, prompts, 1 if short else 2)
    run = {
        "teacher": {"model": teacher, "dtype": "float32"},
        "student": {"model": start, "dtype": "float32"},
        "objective": {"name": "distillm2", "beta": {"maximum": 0.75}},
        "prompts": {**prompts, "train": [{**train, "limit": 30 if short else 2000}]},
        "generation": GENERATION,
        "training": {"rounds": 2, "pairs_per_step": 32, "micro_batch_tokens": 4096},
    }
    sweep = {
        "name": "row-weights",
        "output": str(work / "sweep"),
        "run": run,
        "settings": SETTINGS,
        "learning_rates": [LEARNING_RATE],
        "seeds": list(seeds),
        "metrics": ["expected_acceptance"],
        "shown": ["kl_teacher_model"],
    }
    (work / "sweep.yaml").write_text(json.dumps(sweep), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-c", "from text_distill.cli import main; main()"]
    subprocess.run([*command, "sweep", str(work / "sweep.yaml")], check=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for name, seed in itertools.product(SETTINGS, seeds):
        (folder,) = (work / "sweep").glob(f"{name}-*seed{seed}")
        scores = json.loads((folder / "report.json").read_text(encoding="utf-8"))["scores"]["student"]
        figures = {metric: scores[metric]["value"] for metric in ("expected_acceptance", "kl_teacher_model")}
        runs[name].append({**accuracies(folder, "student", heldout), **figures})
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seeds": list(seeds),
        **{role: accuracies(folder, role, heldout) for role in ("teacher", "start")},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a handful of prompts: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/row-weights"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = measure(options.work.resolve(), options.seeds, short=options.short)
    for role in ("teacher", "start"):
        print(f"{role:12}", "".join(f"  {key} {value:.3f}" for key, value in results[role].items()))
    for name, runs in results["runs"].items():
        print(f"{name:12}", end="")
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"  {key} {statistics.fmean(values):.3f} ± {spread:.3f}", end="")
        print()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
