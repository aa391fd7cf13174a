"""How does a frozen tower look at each picture once in a run, instead of once in every round?

Everything that the tower returns is kept, features of several depths included, in a `Store` of the tower's
fingerprint. A picture is known by its pixels after preprocessing, so the same picture prepared otherwise is
another one. Each is looked at alone, never beside others of a batch: so what is kept does not depend on which
pictures came together, and a resumed run trains on the same bits.

Works where the first axis counts pictures or tiles, and for packed patches with `grid_thw` (Qwen-VL).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shared.errors import UserError
from shared.store import Store

PART_IMAGES = 64  # pictures that are committed together
MEMORY_BYTES = 2**30  # of outputs that are held in memory
# said or not, a tower of transformers does the same
UNSAID = {("return_dict", "True"), ("use_cache", "True"), ("use_cache", "False")}
SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("output", pa.int32(), nullable=False),  # which tensor of what the tower returns
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),
    ]
)


class _Look(NamedTuple):
    key: str
    kind: str  # arguments that are no tensors: they say which outputs there are
    pixels: Tensor
    arguments: dict[str, Any]


class _Form(NamedTuple):
    leaves: list[Any]  # None, and whatever is no tensor, in its place; tensors as Ellipsis
    structure: Any

    def filled(self, tensors: Iterator[Tensor]) -> Any:
        """What the tower returned, with these tensors in it."""
        leaves = [next(tensors) if leaf is ... else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


class TowerCache:
    """What a frozen tower saw. Made by `cache_tower`, undone by `release`."""

    def __init__(self, tower: nn.Module, store: Store) -> None:
        self._tower, self._store = tower, store
        self._memory: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._bytes = 0
        self._pending: dict[str, list[Tensor]] = {}
        self._forms: dict[str, _Form] = {}
        self._parts = {row["image"]: part for part in store.committed() for row in store.read(part)}
        self.looks = 0  # pictures that the tower itself looked at

    def outputs(self, looks: Sequence[_Look], see: Callable[[_Look], Any]) -> Any:
        """What a tower returns for these pictures; `see` has it look at one."""
        kind = looks[0].kind
        kept = [self._recall(look, see) for look in looks]
        if kind not in self._forms:  # all were there: what they are parts of, one more look tells
            self._look(looks[0], see)
        device = looks[0].pixels.device
        return self._forms[kind].filled(torch.cat(pieces).to(device) for pieces in zip(*kept, strict=True))

    def commit(self) -> None:
        """Write what has not been written; call at the end of a round."""
        if not self._pending:
            return
        part = max(self._store.committed(), default=-1) + 1
        self._store.write(
            part,
            [
                {
                    "image": key,
                    "output": number,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "bytes": _content(tensor),
                }
                for key, tensors in self._pending.items()
                for number, tensor in enumerate(tensors)
            ],
        )
        self._parts.update(dict.fromkeys(self._pending, part))
        self._pending.clear()

    def release(self) -> None:
        """Commit, and give the tower its own forward back."""
        self.commit()
        del self._tower.forward  # ours hid the class's

    def _recall(self, look: _Look, see: Callable[[_Look], Any]) -> list[Tensor]:
        known = self._memory.get(look.key) or self._pending.get(look.key)
        if known is not None:
            return known
        if look.key in self._parts:
            for key, tensors in _by_image(self._store.read(self._parts[look.key])).items():
                self._remember(key, tensors)
            return self._memory[look.key]
        tensors = self._look(look, see)
        self._pending[look.key] = tensors
        self._remember(look.key, tensors)
        if len(self._pending) >= PART_IMAGES:
            self.commit()
        return tensors

    def _look(self, look: _Look, see: Callable[[_Look], Any]) -> list[Tensor]:
        self.looks += 1
        with torch.no_grad():
            leaves, structure = pytree.tree_flatten(see(look))
        seen = [isinstance(leaf, Tensor) for leaf in leaves]
        self._forms[look.kind] = _Form(
            [... if is_tensor else leaf for leaf, is_tensor in zip(leaves, seen, strict=True)], structure
        )
        return [leaf.cpu().clone() for leaf, is_tensor in zip(leaves, seen, strict=True) if is_tensor]

    def _remember(self, key: str, tensors: list[Tensor]) -> None:
        if key not in self._memory:
            self._bytes += sum(tensor.nbytes for tensor in tensors)
        self._memory[key] = tensors
        self._memory.move_to_end(key)
        while self._bytes > MEMORY_BYTES and len(self._memory) > 2 * PART_IMAGES:
            _, forgotten = self._memory.popitem(last=False)
            self._bytes -= sum(tensor.nbytes for tensor in forgotten)


class _Remembering:
    """The forward of a tower that asks its cache first; that of a copied tower asks the same one."""

    def __init__(self, tower: nn.Module, cache: TowerCache) -> None:
        self._tower, self._cache = tower, cache

    def __call__(self, pixel_values: Tensor, **arguments: Any) -> Any:
        """What the tower returns for these pictures."""
        device = pixel_values.device.type
        weights = next(self._tower.parameters()).dtype  # a copy may have been converted
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights
        return self._cache.outputs(list(_looks(pixel_values, arguments, f"{weights} {computed}")), self._see)

    def _see(self, look: _Look) -> Any:
        self._tower.eval()
        return type(self._tower).forward(self._tower, look.pixels, **look.arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Remembering:
        return _Remembering(copy.deepcopy(self._tower, memo), self._cache)


def cache_tower(tower: nn.Module, folder: Path) -> TowerCache:
    """Let a frozen tower remember in `folder` what it saw; processes that train together have one each.

    Raises:
        UserError: a tower with trainable weights.
        StoreError: the folder holds what another tower saw.
    """
    if trained := [name for name, parameter in tower.named_parameters() if parameter.requires_grad]:
        raise UserError(
            f"the tower's outputs cannot be kept: {len(trained)} of its weights are trained, the first "
            f"{trained[0]!r}. Freeze the tower, or do without its cache."
        )
    identity = {"tower": fingerprint(tower)}
    cache = TowerCache(tower, Store.open(folder, kind="tower outputs", identity=identity, schema=SCHEMA))
    tower.forward = _Remembering(tower, cache)  # no submodule, so that the names of the weights stay
    return cache


def fingerprint(tower: nn.Module) -> str:
    """What makes two towers the same: class, configuration and weights."""
    digest = hashlib.sha256(type(tower).__name__.encode())
    config: Any = getattr(tower, "config", None)
    if config is not None:
        digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(_content(tensor))
    return digest.hexdigest()[:16]


def _looks(pixel_values: Tensor, arguments: Mapping[str, Any], numbers: str) -> Iterator[_Look]:
    """Each picture with its share of the arguments; `numbers` says in what format the tower computes."""
    grid = arguments.get("grid_thw")
    count = len(pixel_values) if grid is None else len(grid)
    plain = {n: repr(v) for n, v in arguments.items() if not isinstance(v, Tensor)}
    kind = numbers + repr(sorted((n, v) for n, v in plain.items() if (n, v) not in UNSAID))
    sizes = [1] * count if grid is None else grid.prod(dim=1).tolist()
    for index, pixels in enumerate(pixel_values.split(sizes)):
        own = {
            name: value[index : index + 1] if isinstance(value, Tensor) and len(value) == count else value
            for name, value in arguments.items()
        }
        digest = hashlib.sha256(kind.encode())
        for name, value in [("", pixels), *sorted(own.items())]:
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(_content(value))
        yield _Look(digest.hexdigest(), kind, pixels, own)


def _content(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return content


def _by_image(rows: Iterator[dict[str, Any]]) -> dict[str, list[Tensor]]:
    images: dict[str, list[Tensor]] = {}
    for row in rows:
        content = torch.frombuffer(bytearray(row["bytes"]), dtype=getattr(torch, row["dtype"]))
        images.setdefault(row["image"], []).append(content.view(row["shape"]))
    return images
