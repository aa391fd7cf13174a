"""Who goes with whom at the lowest cost? The assignment problem, by shortest augmenting paths.

The Hungarian method with the shortest paths of Jonker and Volgenant (Computing 38, 1987): O(n² m) for n rows
and m columns, n the fewer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cheapest_assignment(cost: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs (row, column), in the order of rows: as many as there are of the fewer, none in two pairs."""
    assert np.isfinite(cost).all(), "costs must be finite"
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in cheapest_assignment(cost.T))
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)  # the row that has a column; the last column is where paths begin
    for row in range(rows):
        owner[columns] = row
        at = columns
        shortest = np.full(columns, np.inf)
        before = np.full(columns, columns)
        done = np.zeros(columns + 1, dtype=bool)
        while owner[at] >= 0:
            done[at] = True
            reduced = cost[owner[at]] - row_price[owner[at]] - column_price[:columns]
            closer = ~done[:columns] & (reduced < shortest)
            shortest[closer], before[closer] = reduced[closer], at
            following = int(np.argmin(np.where(done[:columns], np.inf, shortest)))
            step = shortest[following]
            row_price[owner[done]] += step
            column_price[done] -= step
            shortest[~done[:columns]] -= step
            at = following
        while at != columns:  # along the path, each column goes to the row before it
            previous = int(before[at])
            owner[at] = owner[previous]
            at = previous
    return sorted((int(owner[column]), column) for column in range(columns) if owner[column] >= 0)
