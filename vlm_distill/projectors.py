"""How do a tower's patch tokens become the embeddings of image tokens: fewer, and as wide as the text's?

Reductions keep the picture's order, row by row. `average_pool: n` is the mean of each n x n cells;
`pixel_shuffle: n` puts the n x n cells side by side in one token of n * n times the width, as InternVL and
SmolVLM do, and loses nothing.

Shapes in names: B images, H and W of the grid, P = H * W patch tokens, D width of the tower, N image tokens,
E width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Reduction = Literal["none", "average_pool", "pixel_shuffle"]


class Projector(nn.Module):
    """Reduction, then one linear layer (`linear`) or two with a GELU between them (`mlp`, as in LLaVA-1.5).

    Args:
        kind: linear or mlp; the layers have the names that they have in transformers' Llava.
        grid: rows and columns of the tower's patch tokens.
        reduction: and `factor`, by how much each side of the grid shrinks.
        tower_width: D.
        text_width: E.
    """

    def __init__(
        self,
        kind: Literal["linear", "mlp"],
        *,
        grid: Sequence[int],
        reduction: Reduction,
        factor: int,
        tower_width: int,
        text_width: int,
    ) -> None:
        super().__init__()
        assert reduction == "none" or not (grid[0] % factor or grid[1] % factor), (grid, factor)
        self.grid, self.reduction, self.factor = tuple(grid), reduction, factor
        width = tower_width * factor**2 if reduction == "pixel_shuffle" else tower_width
        self.linear_1 = nn.Linear(width, text_width)
        if kind == "mlp":
            self.act: nn.Module = nn.GELU()
            self.linear_2: nn.Module = nn.Linear(text_width, text_width)
        else:
            self.act = self.linear_2 = nn.Identity()

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """The embeddings (B, N, E) of each image's tokens."""
        tokens = reduce_grid(tokens_BPD, self.grid, self.reduction, self.factor)
        embeddings_BNE: Tensor = self.linear_2(self.act(self.linear_1(tokens)))
        return embeddings_BNE


def reduce_grid(tokens_BPD: Tensor, grid: Sequence[int], reduction: Reduction, factor: int) -> Tensor:
    """The tokens (B, P / factor**2, D) that remain, with `pixel_shuffle` of width D * factor**2."""
    if reduction == "none":
        return tokens_BPD
    rows, columns = grid[0] // factor, grid[1] // factor
    cells = tokens_BPD.unflatten(1, (rows, factor, columns, factor))
    if reduction == "average_pool":
        return cells.mean(dim=(2, 4)).flatten(1, 2)
    return cells.transpose(2, 3).flatten(3).flatten(1, 2)


def reduced_tokens(grid: Sequence[int], reduction: Reduction, factor: int) -> int:
    """How many image tokens a picture becomes."""
    return grid[0] * grid[1] // (1 if reduction == "none" else factor**2)
