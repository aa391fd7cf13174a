"""What does a warm-up leave on disk: whose it is, where it stopped, and the CLIP model it ends with?

`warm_up.json` says whose, and how it ended; `checkpoint/` is there while it runs; the rest is a folder as
open_clip writes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.durable import committed_folder, write_atomically
from shared.errors import StoreError
from vlm_distill.towers import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DESCRIPTION, CHECKPOINT = "warm_up.json", "checkpoint"
History = list[tuple[float, float]]  # loss in nats and accuracy of each step


class WarmedUp(NamedTuple):
    """A finished warm-up."""

    folder: Path
    loss: float  # nats, mean of the last tenth of the steps
    accuracy: (
        float  # of the same steps: the share of a batch's pictures that are nearest to their own caption
    )

    @property
    def weights(self) -> Path:
        """What `TowerSpec.weights` takes."""
        return self.folder / WEIGHTS_FILE


def claim(folder: Path, identity: Mapping[str, Any]) -> WarmedUp | None:
    """Make the folder this warm-up's; what it ended with, if it did.

    Raises:
        StoreError: the folder holds a warm-up with other settings.
    """
    path = folder / DESCRIPTION
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, json.dumps({"identity": identity}, indent=1))
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["identity"] != identity:
        differing = sorted(key for key in identity if stored["identity"].get(key) != identity[key])
        raise StoreError(
            f"{folder} holds a warm-up with another {', another '.join(differing)}. Use another folder, or "
            "delete this one to start over."
        )
    result = stored.get("result")
    return None if result is None else WarmedUp(folder, **result)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, history: History
) -> None:
    """Keep everything that the next step depends on, in place of what was kept before."""
    moments = {
        f"{index}/{name}": tensor
        for index, values in optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
    }
    with committed_folder(folder / CHECKPOINT) as target:
        _save(model.state_dict(), target / "model.safetensors")
        _save(moments, target / "optimizer.safetensors")
        (target / "state.json").write_text(json.dumps({"step": step, "history": history}), encoding="utf-8")


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, History]:
    """Put back what was kept; how many steps were made, and what they showed."""
    from safetensors.torch import load_file

    source = folder / CHECKPOINT
    if not source.is_dir():
        return 0, []
    state = json.loads((source / "state.json").read_text(encoding="utf-8"))
    model.load_state_dict(load_file(source / "model.safetensors"))
    described = optimizer.state_dict()
    described["state"] = {}
    for key, tensor in load_file(source / "optimizer.safetensors").items():
        index, _, name = key.partition("/")
        described["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(described)
    return state["step"], [(loss, accuracy) for loss, accuracy in state["history"]]


def finish(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    clip_config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    history: History,
) -> WarmedUp:
    """Write the CLIP model as open_clip loads it, and how the warm-up ended."""
    tail = history[-max(1, len(history) // 10) :]
    loss, accuracy = (sum(column) / len(tail) for column in zip(*tail, strict=True))
    tokenizer.save_pretrained(folder)
    stored = {"model_cfg": clip_config, "preprocess_cfg": preprocess}
    write_atomically(folder / "open_clip_config.json", json.dumps(stored, indent=1))
    _save(model.state_dict(), folder / WEIGHTS_FILE)
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    described["result"] = {"loss": loss, "accuracy": accuracy}
    write_atomically(folder / DESCRIPTION, json.dumps(described, indent=1))
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return WarmedUp(folder, loss, accuracy)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
