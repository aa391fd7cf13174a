"""Is scoring fast enough to forget about it? VQA accuracy, programs in the sandbox, the bootstrap.

    python benchmarks/evaluation.py [--short] [--out FILE] [--data FOLDER]

vqa        60,000 questions with ten answers each, on one core, beside lmms-eval's own function where that is
           installed (`pip install --no-deps lmms-eval loguru`): both score the same replies in turns (A B A B
           ...), and the ratio is the median of the rounds' ratios. Half the replies are what the first person
           said, the others what the first person said to another question.
sandbox    1,000 programs with tests on two workers: wall time beyond their own run time, which is that of the
           same code in this process, divided by the workers.
bootstrap  difference, retention and gap closed of three models on 10,000 samples, 10,000 resamples.

`--data` is a folder of real VQA annotations (`vqa_annotatons_*.gzip`, the official JSON); without it they
are made up. Times are CPU seconds, but for programs. The file is not called eval.py: beside other benchmarks
that name would hide the package.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from eval.metrics.vqa_accuracy import normalise, normalise_mmf, scores
from eval.sandbox.isolation import SandboxError
from eval.sandbox.proof import Program
from eval.sandbox.runner import Sandbox
from eval.statistics import RESAMPLES, paired_bootstrap

QUESTIONS, PROGRAMS, SAMPLES = 60_000, 1_000, 10_000
WORKERS = 2
TARGET_S = {"vqa": 5.0, "sandbox": 60.0, "bootstrap": 2.0}


class Questions(NamedTuple):
    """Replies with the ten answers of each."""

    source: str
    replies: list[str]
    answers: list[list[str]]


def annotated(folder: Path | None, count: int) -> Questions:
    """Real questions where there is a folder of them."""
    files = sorted(folder.glob("vqa_annotatons_*.gzip")) if folder else []
    answers = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = json.load(lines)["annotations"]
        answers += [[answer["answer"] for answer in row["answers"]] for row in rows]
    source = f"VQA v2, {len(answers)} questions" if answers else "made up"
    answers = answers[:count] if answers else made_up(count)
    first = [ten[0] for ten in answers]
    shifted = first[1:] + first[:1]
    replies = [a if number % 2 else b for number, (a, b) in enumerate(zip(first, shifted, strict=True))]
    return Questions(source, replies, answers)


def made_up(count: int) -> list[list[str]]:
    """Answers as people give them: a few common ones, many rare ones, disagreement on most questions."""
    draw = random.Random(0)
    common = ["yes", "no", "1", "two", "white", "a man", "blue and red", "don't know", "on the table"]

    def answer() -> str:
        rare = f"{draw.choice(common)} {draw.choice(('of', 'with', 'the'))} {draw.randrange(5000)}"
        return draw.choice(common) if draw.random() < 0.7 else rare

    questions = []
    for _ in range(count):
        usual = answer()
        agree = draw.random() < 1 / 3
        questions.append([usual if agree or draw.random() < 0.6 else answer() for _ in range(10)])
    return questions


def vqa(questions: Questions, rounds: int) -> dict[str, Any]:
    """Both modes, and the peer in turns with the official one."""

    def ours(mode: str) -> list[float]:
        normalise.cache_clear()
        normalise_mmf.cache_clear()
        return scores(questions.replies, questions.answers, mode)

    peer = lmms_eval_function()
    result: dict[str, Any] = {"source": questions.source, "questions": len(questions.replies)}
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for mode in ("official", "mmf"):
            seconds, values = timed(lambda mode=mode: ours(mode))
            times.setdefault(mode, []).append(seconds)
            result[f"{mode}_accuracy"] = sum(values) / len(values)
            if mode == "official" and not isinstance(peer, str):
                documents = [document(ten) for ten in questions.answers]  # anew: the peer writes into them
                seconds, theirs = timed(lambda documents=documents: peer_scores(peer, documents, questions))
                times.setdefault("lmms_eval", []).append(seconds)
                result["lmms_eval_accuracy"] = sum(theirs) / len(theirs)
                result["questions_scored_otherwise"] = sum(
                    abs(a - b) > 1e-9 for a, b in zip(values, theirs, strict=True)
                )
    result["seconds"] = {name: rounded(of) for name, of in times.items()}
    if isinstance(peer, str):
        return result | {"lmms_eval": peer}
    ratios = [b / a for a, b in zip(times["official"], times["lmms_eval"], strict=True)]
    return result | {
        "lmms_eval": importlib.metadata.version("lmms-eval"),
        "lmms_eval_ratio": round(statistics.median(ratios), 1),
        "lmms_eval_ratio_by_round": [round(ratio, 1) for ratio in ratios],
    }


def lmms_eval_function() -> Callable[..., dict[str, Any]] | str:
    """lmms-eval's scorer of VQA v2, without the harness around it; or why it cannot be had."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        return "not installed"
    tasks = ModuleType("lmms_eval.tasks")  # its own __init__ wants the whole harness and all its requirements
    tasks.__path__ = [str(Path(place) / "tasks") for place in found.submodule_search_locations]
    sys.modules.setdefault("lmms_eval.tasks", tasks)
    try:
        return importlib.import_module("lmms_eval.tasks.vqav2.utils").vqav2_process_results
    except ImportError as error:
        return f"cannot be imported: {error}"


def document(answers: Sequence[str]) -> dict[str, Any]:
    """A question as lmms-eval reads it."""
    given = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]
    return {"question_id": 0, "answers": given}


def peer_scores(
    peer: Callable[..., dict[str, Any]], documents: Sequence[dict[str, Any]], questions: Questions
) -> list[float]:
    """What lmms-eval gives each reply."""
    return [
        peer(document, [reply])["exact_match"]
        for document, reply in zip(documents, questions.replies, strict=True)
    ]


def sandboxed(count: int) -> dict[str, Any]:
    """Programs of some milliseconds each, all right."""
    programs = [made_program(number) for number in range(count)]
    try:
        sandbox = Sandbox(workers=WORKERS)
    except SandboxError as error:
        return {"left_out": str(error)}
    began = time.perf_counter()
    passed = sum(verdict.passed for verdict in sandbox.run(programs))
    wall_s = time.perf_counter() - began
    own_s = sum(own_seconds(program) for program in programs)
    return {
        "programs": count,
        "passed": passed,
        "isolation": sandbox.isolation.kind,
        "workers": WORKERS,
        "wall_s": round(wall_s, 1),
        "own_s": round(own_s, 2),
        "overhead_s": round(wall_s - own_s / WORKERS, 1),
        "overhead_ms_per_program": round(1000 * (wall_s - own_s / WORKERS) / count, 1),
    }


def made_program(number: int) -> Program:
    """Counts primes by trial division, with tests as HumanEval has them."""
    limit = 200 + number % 100
    source = (
        "def primes(limit):\n    return [n for n in range(2, limit) if all(n % d for d in range(2, n))]\n"
    )
    right = len([n for n in range(2, limit) if all(n % d for d in range(2, n))])
    tests = "assert primes(2) == []\nassert primes(10) == [2, 3, 5, 7]\n"
    return Program(str(number), source, f"{tests}assert len(primes({limit})) == {right}\n", "", ("primes",))


def own_seconds(program: Program) -> float:
    """Program and tests in this process. They are ours, not a model's."""
    began = time.perf_counter()
    exec(compile(f"{program.source}\n{program.tests}", program.id, "exec"), {})
    return time.perf_counter() - began


def bootstrap(count: int, rounds: int) -> dict[str, Any]:
    """With every sample alone, and with about three questions on an image."""
    draw = np.random.default_rng(0)
    teacher, start, student = (draw.random((3, count)) < [[0.8], [0.4], [0.7]]).astype(float)
    images = [str(image) for image in draw.integers(0, count // 3, count)]
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, clusters in (("alone", None), ("clustered", images)):
            taken, _ = timed(
                lambda clusters=clusters: paired_bootstrap(
                    teacher=teacher, start=start, student=student, clusters=clusters
                )
            )
            seconds.setdefault(name, []).append(taken)
    return {
        "samples": count,
        "resamples": RESAMPLES,
        "seconds": {name: rounded(of) for name, of in seconds.items()},
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returns."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def rounded(seconds: Sequence[float]) -> dict[str, float]:
    """Median and range over the rounds."""
    return {
        "median": round(statistics.median(seconds), 2),
        "min": round(min(seconds), 2),
        "max": round(max(seconds), 2),
    }


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def met(results: dict[str, Any]) -> dict[str, bool | None]:
    """Which targets hold, by the worst round; None where nothing was measured."""
    worst = {
        "vqa": max(results["vqa"]["seconds"][mode]["max"] for mode in ("official", "mmf")),
        "sandbox": results["sandbox"].get("overhead_s"),
        "bootstrap": max(of["max"] for of in results["bootstrap"]["seconds"].values()),
    }
    return {name: None if worst[name] is None else worst[name] < TARGET_S[name] for name in TARGET_S}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a tenth of it, once, in about ten seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eval.json"))
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    share, rounds = (10, 1) if arguments.short else (1, arguments.rounds)
    results: dict[str, Any] = {"machine": machine(), "rounds": rounds, "target_s": TARGET_S}
    results["vqa"] = vqa(annotated(arguments.data, QUESTIONS // share), rounds)
    results["sandbox"] = sandboxed(PROGRAMS // share)
    results["bootstrap"] = bootstrap(SAMPLES, rounds)
    if not arguments.short:
        results["met"] = met(results)
    print(json.dumps(results, indent=2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
