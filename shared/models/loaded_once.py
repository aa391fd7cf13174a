"""How do runs of one process share what they load: models read once from disk, adapters with their memory?"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import nn

from shared.adapter import Adapter, AdapterKind
from shared.models.references import ModelRef


class LoadedOnce:
    """An `AdapterKind` that hands out copies of the models that were named to it, and reads others anew.

    An adapter has no weights and does not depend on the run, so it is the same for all.

    Args:
        kind: what loads.
        shared: the references that several runs open, whose files stay as they are.
    """

    def __init__(self, kind: AdapterKind, shared: Collection[ModelRef]) -> None:
        self._kind = kind
        self.claims, self.make_student, self.additions = kind.claims, kind.make_student, kind.additions
        self._shared = list(shared)
        self._adapters: list[tuple[ModelRef, Adapter]] = []
        self._models: list[tuple[ModelRef, torch.dtype, nn.Module]] = []

    def open(self, ref: ModelRef, options: Mapping[str, object]) -> Adapter:
        """The one adapter of a shared model, or a new one."""
        if options or ref not in self._shared:
            return self._kind.open(ref, options)
        for known, adapter in self._adapters:
            if known == ref:
                return adapter
        self._adapters.append((ref, self._kind.open(ref, options)))
        return self._adapters[-1][1]

    def load(self, ref: ModelRef, *, dtype: torch.dtype) -> nn.Module:
        """A copy of a shared model, or another model from its files."""
        if ref not in self._shared:
            return self._kind.load(ref, dtype=dtype)
        for known, its_dtype, model in self._models:
            if (known, its_dtype) == (ref, dtype):
                return copy.deepcopy(model)
        self._models.append((ref, dtype, self._kind.load(ref, dtype=dtype)))
        return copy.deepcopy(self._models[-1][2])
