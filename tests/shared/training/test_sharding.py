from __future__ import annotations

from processes import in_two_processes


def test_gradients_of_a_sharded_student_are_those_of_one_process() -> None:
    """FSDP2 over two processes, the head in the root unit, two micro-batches accumulated in each."""
    in_two_processes("import sharded; sharded.compare_with_one_process()")
