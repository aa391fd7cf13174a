"""Which rows are worked on together? Chunks that fit a budget of bytes, and slices that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

CPU_BUFFER_BYTES = 96 << 20
GPU_BUFFER_BYTES = 768 << 20
CPU_SLICE_BYTES = 400 << 10  # about five of them are in use at a time: a second-level cache
GPU_SLICE_BYTES = 64 << 20  # there, fewer and larger kernels count for more


class Span(NamedTuple):
    """Rows start:stop."""

    start: int
    stop: int


class ChunkSizes(NamedTuple):
    """How many rows go together at most."""

    chunk: int  # rows whose logits are held at once, of each model
    slice: int  # rows whose divergence is computed at once


def chunk_sizes(
    rows: int,
    row_bytes: int,
    *,
    models: int,
    intermediates: int,
    on_cpu: bool,
    buffer_bytes: int | None,
    rounded: bool = False,
) -> ChunkSizes:
    """The largest chunks whose buffers stay in the budget, and at least one row.

    Args:
        rows: all of them.
        row_bytes: of the logits of one row.
        models: whose logits are held.
        intermediates: values of the size of a slice.
        on_cpu: whether slices are for a processor's cache or for a GPU.
        buffer_bytes: the budget; None for the device's default.
        rounded: a chunk's gradient is copied in half the bytes.
    """
    budget = buffer_bytes or (CPU_BUFFER_BYTES if on_cpu else GPU_BUFFER_BYTES)
    slice_bytes = min(CPU_SLICE_BYTES if on_cpu else GPU_SLICE_BYTES, budget // 8)
    slice_rows = max(1, min(rows, slice_bytes // row_bytes))
    chunk_rows = int((budget // row_bytes - intermediates * slice_rows) / (models + 0.5 * rounded))
    return ChunkSizes(max(1, min(rows, chunk_rows)), slice_rows)


def even_chunks(start: int, stop: int, most_rows: int) -> list[Span]:
    """The fewest chunks of at most so many rows, nearly equal."""
    count = -(-(stop - start) // most_rows)
    edges = [start + (stop - start) * index // max(1, count) for index in range(count + 1)]
    return [Span(*edges) for edges in pairwise(edges)]


def whole_units(starts: Sequence[int], rows: int, most_rows: int) -> Iterator[Span]:
    """As many whole units as fit so many rows, or one that is longer.

    Args:
        starts: the first row of each unit, ascending from 0.
        rows: all of them.
        most_rows: of a chunk.
    """
    edges = [*starts, rows]
    first = 0
    for edge, following in zip(edges, [*edges[1:], None], strict=True):
        if edge > first and (following is None or following - first > most_rows):
            yield Span(first, edge)
            first = edge


def slices(start: int, stop: int, most_rows: int) -> Iterator[Span]:
    """Slices of so many rows, and a rest."""
    for first in range(start, stop, most_rows):
        yield Span(first, min(first + most_rows, stop))
