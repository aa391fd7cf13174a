"""How does a head meet a few rows at a time? Logits and their gradients through buffers that are reused.

Shapes in names: N rows, C rows of a chunk, D width of the hidden states, V ids of the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from shared.objectives.head import EXCLUDED_LOGIT, Head

WEIGHT_BLOCK_BYTES = 8 << 20
"""A low-precision weight is widened in blocks of this size, which stay in cache; never as a whole."""


@cache
def multiplies_natively(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of that low precision can be summed up, and returned, in float32 on a device.

    On a CPU PyTorch rounds such a product to the low precision again, so there the weight is widened: exact,
    and as fast where the processor has no units for it.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    one = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        native_product(one, one, out=torch.empty(16, 16, device=device))
        native_product(one, one, out=torch.zeros(16, 16, device=device), add=True)
    except (TypeError, RuntimeError):  # an older torch, or no such kernel for the device
        return False
    return True


def native_product(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """A product of two low-precision matrices into a float32 one, or added to it."""
    if add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


class Projection:
    """One model's head over its hidden states, chunk by chunk, without autograd.

    Args:
        hidden_ND: final hidden states.
        head: as the plain `Head.logits` reads it.
        rows: the most rows of a chunk.
        dtype: of the logits; wider than or equal to those of `hidden_ND` and the weight.
    """

    def __init__(self, hidden_ND: Tensor, head: Head, *, rows: int, dtype: torch.dtype) -> None:
        self._hidden_ND = hidden_ND.detach()
        self._head = head
        self._weight_VD = head.shared_weight_VD.detach()
        self._logits_CV = hidden_ND.new_empty(rows, head.vocabulary_size, dtype=dtype)
        self._bias_V = head.shared_bias_V
        if self._bias_V is not None:
            self._bias_V = self._bias_V.detach().to(dtype) * head.logit_scale
        low = self._weight_VD.dtype
        self._is_native = (
            dtype == torch.float32
            and self._hidden_ND.dtype == low
            and multiplies_natively(self._hidden_ND.device, low)
        )
        if low != dtype:
            width = self._weight_VD.shape[1]
            block_rows = max(1, WEIGHT_BLOCK_BYTES // (width * dtype.itemsize))
            self._block_BD = hidden_ND.new_empty(min(block_rows, head.vocabulary_size), width, dtype=dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """The logits (C, V) of rows start:stop, in the buffer: valid until the next call, and writable."""
        logits_CV = self._logits_CV[: stop - start]
        if self._is_native:
            native_product(self._hidden_ND[start:stop], self._weight_VD.T, out=logits_CV)
            if self._head.logit_scale != 1.0:
                logits_CV.mul_(self._head.logit_scale)
        else:
            hidden_CD = self._scaled_hidden(start, stop)
            for block, weight_BD in self._weight_blocks():
                torch.mm(hidden_CD, weight_BD.T, out=logits_CV[:, block])
        if self._bias_V is not None:
            logits_CV.add_(self._bias_V)
        if self._head.softcap is not None:
            logits_CV.div_(self._head.softcap).tanh_().mul_(self._head.softcap)
        if self._head.excluded_ids is not None and self._head.excluded_ids.numel():
            logits_CV.index_fill_(1, self._head.excluded_ids, EXCLUDED_LOGIT)
        return logits_CV

    def factor(self, gradient_CV: Tensor) -> Tensor:
        """The logits' gradient as its products take it: where native, rounded like that of such logits."""
        return gradient_CV.to(self._weight_VD.dtype) if self._is_native else gradient_CV

    def hidden_gradient(self, gradient_CV: Tensor, scale_C: Tensor, *, out: Tensor) -> None:
        """The gradient (C, D) of the hidden states.

        Args:
            gradient_CV: `factor` of the gradient of the logits before the soft-cap, up to one number a row.
            scale_C: that number.
            out: overwritten.
        """
        if self._is_native:
            native_product(gradient_CV, self._weight_VD, out=out)
        else:
            for index, (block, weight_BD) in enumerate(self._weight_blocks()):
                torch.addmm(out, gradient_CV[:, block], weight_BD, beta=0 if index == 0 else 1, out=out)
        out.mul_(scale_C[:, None] * self._head.logit_scale)

    def add_weight_gradient(
        self,
        gradient_CV: Tensor,
        scale_C: Tensor,
        start: int,
        stop: int,
        *,
        into_VD: Tensor,
        is_first: bool,
    ) -> None:
        """Add rows start:stop to the gradient of the shared rows of the weight; the first overwrites."""
        shared_VD = into_VD[: gradient_CV.shape[1]]
        hidden_CD = self._scaled_hidden(start, stop) * scale_C[:, None]
        if self._is_native:
            native_product(gradient_CV.T, hidden_CD.to(gradient_CV.dtype), out=shared_VD, add=not is_first)
            return
        torch.addmm(shared_VD, gradient_CV.T, hidden_CD, beta=0 if is_first else 1, out=shared_VD)

    def add_bias_gradient(self, gradient_CV: Tensor, scale_C: Tensor, *, into_V: Tensor) -> None:
        """Add a chunk to the gradient of the shared entries of the bias."""
        into_V[: gradient_CV.shape[1]].addmv_(gradient_CV.T, scale_C, alpha=self._head.logit_scale)

    def _scaled_hidden(self, start: int, stop: int) -> Tensor:
        hidden_CD = self._hidden_ND[start:stop].to(self._logits_CV.dtype)
        return hidden_CD if self._head.logit_scale == 1.0 else hidden_CD * self._head.logit_scale

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the type of the logits, whole where it has that type."""
        if self._weight_VD.dtype == self._logits_CV.dtype:
            yield slice(0, len(self._weight_VD)), self._weight_VD
            return
        for start in range(0, len(self._weight_VD), len(self._block_BD)):
            weight_BD = self._weight_VD[start : start + len(self._block_BD)]
            yield (
                slice(start, start + len(weight_BD)),
                self._block_BD[: len(weight_BD)].copy_(weight_BD),
            )
