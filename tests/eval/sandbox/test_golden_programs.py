"""The reference solutions pass their own tests, wrong ones do not: HumanEval and MBPP, whole."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.sandbox.isolation import SandboxError
from eval.sandbox.problems import humaneval_program, mbpp_program
from eval.sandbox.proof import Program
from eval.sandbox.runner import Sandbox

Row = Mapping[str, Any]
# Their tests build trees out of `Node` before there is a program, and define no such class.
MBPP_WITHOUT_NODE = {"MBPP/367", "MBPP/927"}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def not_passed(sandbox: Sandbox, programs: Sequence[Program]) -> dict[str, str]:
    return {v.id: f"{v.status}: {v.detail}" for v in sandbox.run(programs) if not v.passed}


def humaneval(folder: Path) -> list[Row]:
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mbpp_full(folder: Path) -> list[Row]:
    with (folder / "mbpp" / "mbpp.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mbpp_sanitized(folder: Path) -> list[Row]:
    return json.loads((folder / "mbpp" / "sanitized-mbpp.json").read_text(encoding="utf-8"))


def test_humaneval_reference_solutions_all_pass(sandbox: Sandbox, real_data: Path) -> None:
    rows = humaneval(real_data)
    assert len(rows) == 164
    programs = [humaneval_program(row, row["prompt"] + row["canonical_solution"]) for row in rows]
    assert not_passed(sandbox, programs) == {}


def test_humaneval_stubs_all_fail(sandbox: Sandbox, real_data: Path) -> None:
    rows = random.Random(0).sample(humaneval(real_data), 20)
    verdicts = list(
        sandbox.run([humaneval_program(row, row["prompt"] + "    return None\n") for row in rows])
    )
    assert {v.status for v in verdicts} == {"failed"}


def test_a_sample_of_mbpp_passes(sandbox: Sandbox, real_data: Path) -> None:
    rows = random.Random(0).sample(mbpp_full(real_data), 20) + random.Random(0).sample(
        mbpp_sanitized(real_data), 10
    )
    programs = [mbpp_program(row, row["code"]) for row in rows]
    assert not_passed(sandbox, programs).keys() <= MBPP_WITHOUT_NODE


def test_mbpp_rows_that_lack_a_class_fail_and_say_so(sandbox: Sandbox, real_data: Path) -> None:
    rows = [row for row in mbpp_full(real_data) if f"MBPP/{row['task_id']}" in MBPP_WITHOUT_NODE]
    failed = not_passed(sandbox, [mbpp_program(row, row["code"]) for row in rows])
    assert failed.keys() == MBPP_WITHOUT_NODE
    assert all("'Node' is not defined" in detail for detail in failed.values())


@pytest.mark.slow
def test_mbpp_sanitized_reference_solutions_all_pass(sandbox: Sandbox, real_data: Path) -> None:
    rows = mbpp_sanitized(real_data)
    assert len(rows) == 427
    assert not_passed(sandbox, [mbpp_program(row, row["code"]) for row in rows]) == {}


@pytest.mark.slow
def test_mbpp_reference_solutions_pass_but_for_two(sandbox: Sandbox, real_data: Path) -> None:
    rows = mbpp_full(real_data)
    assert len(rows) == 974
    assert not_passed(sandbox, [mbpp_program(row, row["code"]) for row in rows]).keys() == MBPP_WITHOUT_NODE
