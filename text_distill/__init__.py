"""Text distillation: the adapter for causal language models, its run configuration and its command line."""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

import eval as _eval_package
import shared as _shared_package

for _package in (_shared_package, _eval_package):
    if not getattr(_package, "VLM_DISTILL_PACKAGE", False):
        raise ImportError(
            f"another package named {_package.__name__!r} shadows the one of vlm-distill: "
            f"{getattr(_package, '__path__', _package)}. "
            "Remove it from sys.path, or put vlm-distill before it."
        )

if _TYPE_CHECKING:
    from shared.api import AnyConfig, Result

__all__ = ["distill"]


def distill(config: AnyConfig, *overrides: str, smoke: bool = False, quiet: bool = False) -> Result:
    """Distil a causal language model, as `distill-text run` does: sample, train, export, evaluate, report.

    Called again with the same configuration it goes on where it was. docs/PYTHON.md has an example.

    Args:
        config: a `TextRunConfig`, a mapping with its sections, or the path of a YAML file.
        *overrides: settings that replace the configuration's, as "training.rounds=1".
        smoke: every stage on a handful of samples, in a folder of its own.
        quiet: say nothing.

    Returns:
        Where run and student lie, and what the report holds.

    Raises:
        UserError: whatever the user can mend, in one message; nothing that was committed is lost.
    """
    from shared.api import distill_with  # so that importing this package stays light
    from text_distill.cli import MODALITY

    return distill_with(MODALITY, config, overrides, smoke=smoke, quiet=quiet)
