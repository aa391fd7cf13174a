"""Which blocks does a pruned student keep? Apart from `pruning`, because `check` asks it without torch."""

from __future__ import annotations

from collections.abc import Sequence

from shared.config_models import PruneConfig
from shared.errors import UserError


def keep_layers(config: PruneConfig, layers: int, influence: Sequence[float] | None) -> tuple[int, ...]:
    """The indices of the blocks that stay, ascending.

    First and last blocks are treated like all others: their influence is high where they matter, and an
    explicit list says what it means.

    Args:
        config: explicit blocks to drop, every n-th to keep, or how many to drop by influence.
        layers: blocks of the model.
        influence: one value a block; needed for `block_influence` only. Ties drop the later block.

    Raises:
        UserError: indices that the model does not have or that repeat, or nothing left.
    """
    if config.keep_every is not None:
        if config.keep_every > layers:
            raise UserError(
                f"prune.keep_every: {config.keep_every} is more than this model's {layers} blocks; "
                f"give 2 to {layers}."
            )
        return tuple(range(0, layers, config.keep_every))
    if config.drop_layers is not None:
        foreign = [i for i in config.drop_layers if not 0 <= i < layers]
        if foreign:
            raise UserError(
                f"prune.drop_layers: {foreign} are not blocks of this model; it has 0 to {layers - 1}."
            )
        if len(set(config.drop_layers)) < len(config.drop_layers):
            raise UserError(f"prune.drop_layers names a block twice: {list(config.drop_layers)}.")
        dropped = set(config.drop_layers)
    else:
        assert config.block_influence is not None
        assert influence is not None and len(influence) == layers, (influence, layers)
        by_influence = sorted(range(layers), key=lambda i: (influence[i], -i))
        dropped = set(by_influence[: config.block_influence])
    if len(dropped) >= layers:
        raise UserError(f"prune drops all {layers} blocks of this model; at least one must stay.")
    return tuple(i for i in range(layers) if i not in dropped)
