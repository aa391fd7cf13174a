"""How does a model read [prompt | y_t | y_s] as one sequence, with the responses hidden from each other?

`sees` says it once, of two positions. SDPA and eager attention take it as a dense mask, flex attention as a
`BlockMask`: blocks of keys that no query of a block may see, such as y_t for y_s, are never computed.

`attend_in_blocks` sets a model to `FLEX_IN_PAIRS`, an attention of our own that is flex attention where it
gets a block mask, and SDPA elsewhere: sampling and every separate sequence stay what they are without it. The
mask decides, so gradient checkpointing computes the same again.

Shapes in names: B sequences, T tokens of a padded sequence, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shared.data.layouts import PADDING, PROMPT
from shared.errors import UserError

FLEX_IN_PAIRS = "flex_in_pairs"
BLOCK_ATTENTION = ("flex_attention", FLEX_IN_PAIRS)  # implementations that take a BlockMask
LEAST_HEAD_WIDTH = 16  # of flex attention's kernel (torch/_inductor/kernel/flex, 2.14)
DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def sees(segment_BT: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query may see a key, as flex attention asks: by indices of sequence, head, query and key.

    A token sees the prompt and its own segment, as far as they do not lie ahead. Padding sees itself alone:
    not nothing, of which SDPA makes NaN.
    """

    def mask_mod(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = segment_BT[sequence, query], segment_BT[sequence, key]
        shared = (of_key == PROMPT) | (of_key == of_query)
        return (key <= query) & shared & ((of_query != PADDING) | (key == query))

    return mask_mod


def dense_mask(segment_BT: Tensor) -> Tensor:
    """(B, 1, T, T), True where a token (third axis) may look."""
    sequences, tokens = (torch.arange(size, device=segment_BT.device) for size in segment_BT.shape)
    return sees(segment_BT)(
        sequences[:, None, None, None], sequences[:1], tokens[:, None], tokens[None, :]
    )  # fmt: skip


def block_mask(segment_BT: Tensor) -> BlockMask:
    """The same for flex attention, with the blocks that nobody sees left out."""
    sequences, tokens = segment_BT.shape
    # not compiled: the T x T booleans live for a moment, once for all layers, and a compiled one would be
    # compiled anew for other shapes
    return create_block_mask(sees(segment_BT), sequences, None, tokens, tokens, device=segment_BT.device)


def pair_mask(causal_lm: Any, segment_BT: Tensor) -> Tensor | BlockMask:
    """The mask as the model's attention wants it: transformers passes a ready one on as it is."""
    attention = causal_lm.config.get_text_config(decoder=True)._attn_implementation
    if attention in BLOCK_ATTENTION:
        return block_mask(segment_BT)
    mask_B1TT = dense_mask(segment_BT)
    if attention != "eager":
        return mask_B1TT  # SDPA takes booleans, in whatever dtype autocast runs it
    zero = torch.zeros((), dtype=causal_lm.dtype, device=mask_B1TT.device)
    return torch.where(mask_B1TT, zero, torch.finfo(zero.dtype).min)  # eager adds it to its scores


def require_gpu(device: torch.device) -> None:
    """Refuse flex attention where it is not trained with.

    Raises:
        UserError: not a CUDA device.
    """
    if device.type != "cuda":
        raise UserError(
            f"training.pair_attention: flex needs a CUDA device, and this run is on {device.type!r}: flex "
            "attention has no backward pass on a CPU, and has not been tried elsewhere. Set it to dense."
        )


def flex_obstacle(causal_lm: Any, *, trained: bool) -> str | None:
    """Why a model's pairs cannot go through flex attention, by its configuration, or None.

    Args:
        causal_lm: a transformers model.
        trained: its attention's dropout, which flex attention does not have, would be in effect.
    """
    config = causal_lm.config.get_text_config(decoder=True)
    decoder = causal_lm.get_decoder()
    if not decoder._supports_flex_attn or not decoder._can_set_attn_implementation():
        return f"{type(decoder).__name__} has no flex attention in transformers"
    if config._attn_implementation not in ("sdpa", *BLOCK_ATTENTION):
        return f"its own attention is {config._attn_implementation}, and only SDPA can take turns with flex"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width < LEAST_HEAD_WIDTH:
        return f"its attention heads are {width} wide, and flex attention takes {LEAST_HEAD_WIDTH} or more"
    dropout = next((key for key in DROPOUT_KEYS if getattr(config, key, None)), None)
    if trained and dropout is not None:
        return f"its {dropout} is {getattr(config, dropout):g}, and flex attention has no dropout"
    return None


def attend_in_blocks(causal_lm: Any) -> None:
    """Let a model's pairs go through flex attention; whatever has no block mask stays with SDPA."""
    causal_lm.config.get_text_config(decoder=True)._attn_implementation = FLEX_IN_PAIRS


def _flex_in_pairs(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Any:
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if torch.is_autocast_enabled(
        query.device.type
    ):  # SDPA's inputs are cast by autocast, flex attention's not
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(FLEX_IN_PAIRS, _flex_in_pairs)
AttentionMaskInterface.register(FLEX_IN_PAIRS, sdpa_mask)
