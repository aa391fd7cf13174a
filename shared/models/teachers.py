"""What does a teacher give the loss, and how does a model in this process give it?

Shapes in names: B sequences, T tokens of a padded sequence, N rows that predict response tokens, E width of
the teacher's hidden states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from shared.adapter import Adapter
from shared.models.heads import causal_lm_of, head_of, hidden_rows
from shared.models.vocabulary import SharedVocabulary
from shared.objectives.signal import Dense, Signal, Sparse
from shared.types import Encoded, Group

__all__ = ["Dense", "LocalTeacher", "Signal", "Sparse", "Teacher", "dense_signal", "fingerprint_of_model"]

# What a configuration says of where and by what it was written, not of what the model computes.
VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "use_cache"})


class Teacher(Protocol):
    """What gives the loss the teacher's distribution at the rows that predict response tokens."""

    reads_encodings: bool  # False: `signal` needs the groups alone

    @property
    def fingerprint(self) -> str:
        """Of weights, configuration and adapter."""
        ...

    def signal(self, groups: Sequence[Group], encoded: Encoded | None) -> Signal:
        """The signal at the response rows of the groups, in the order of `encode`.

        Args:
            groups: the samples and their responses.
            encoded: this model's own view of them where the caller has it; None to encode here.
        """
        ...


class LocalTeacher(nn.Module):
    """A frozen model in this process: one pass of its backbone, only the response rows kept.

    It stays in eval mode and without gradients whatever is called on it or on a module that holds it.
    """

    reads_encodings = True

    def __init__(
        self, model: nn.Module, adapter: Adapter, shared_vocabulary: SharedVocabulary | None
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._adapter = adapter
        self._shared_vocabulary = shared_vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, configuration and adapter; computed once, at the first use."""
        text = f"{fingerprint_of_model(self.model)} {self._adapter.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()

    def train(self, mode: bool = True) -> LocalTeacher:
        """Stays in eval mode; `mode` has no effect."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def signal(self, groups: Sequence[Group], encoded: Encoded | None) -> Dense:
        """The hidden rows that predict response tokens, and the teacher's head."""
        if encoded is None:
            encoded = self._adapter.encode(groups, layout="separate")
        return dense_signal(self.model, encoded, self._shared_vocabulary)


@torch.no_grad()
def dense_signal(model: nn.Module, encoded: Encoded, shared_vocabulary: SharedVocabulary | None) -> Dense:
    """A model's hidden rows that predict response tokens, and its head; leaves the model in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in encoded.inputs.items()}
    return Dense(hidden_rows(model, inputs, encoded.rows_N.to(device)), head_of(model, shared_vocabulary))


def fingerprint_of_model(model: nn.Module) -> str:
    """SHA-256 over a model's configuration and all its saved tensors, independent of device and folder.

    Tied tensors are hashed once.
    """
    config = causal_lm_of(model).config.to_dict()
    plain = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    # a LoRA's scale is in its settings, not in its tensors
    loras = {name: lora.to_dict() for name, lora in getattr(model, "peft_config", {}).items()}
    digest = hashlib.sha256(json.dumps([plain, loras], sort_keys=True, default=str).encode())
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
