"""How does open_clip's attention become one that low-rank updates reach?

`nn.MultiheadAttention` keeps query, key and value in a bare parameter and reads its output layer's weight
past that layer's forward. So a LoRA that wraps the layer gets no gradient; and peft's own wrapper of the
whole module (0.21.2) adds the output's update twice, and at every forward adds updates to the weights and
takes them away again. The same attention out of two linear layers has neither trouble.

Shapes in names: B images, T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Self-attention over all tokens, with the weights of a `nn.MultiheadAttention`."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        assert source.batch_first and source.in_proj_weight is not None, "separate key or value width"
        self.heads = source.num_heads
        self.in_proj = nn.Linear(source.embed_dim, 3 * source.embed_dim)
        self.out_proj = nn.Linear(source.embed_dim, source.embed_dim)
        self.in_proj.weight, self.in_proj.bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias

    def forward(self, query_BTD: Tensor, *_: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        """The attended tokens (B, T, D), as the first of two like its model."""
        assert arguments.get("attn_mask") is None, "a tower looks everywhere"
        qkv = self.in_proj(query_BTD).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


@torch.no_grad()
def with_plain_attention(module: nn.Module) -> None:
    """Replace every `nn.MultiheadAttention` below a module, in place."""
    for child_name, child in list(module.named_children()):
        if isinstance(child, nn.MultiheadAttention):
            setattr(module, child_name, PlainAttention(child))
        else:
            with_plain_attention(child)
