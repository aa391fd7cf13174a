"""Vision-language distillation: the adapter for models that see, their assembly, and their command line.

Importing it makes transformers' Auto classes know the models assembled here; see `registration`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

import eval as _eval_package
import shared as _shared_package
from vlm_distill.registration import register_with_transformers as _register_with_transformers

for _package in (_shared_package, _eval_package):
    if not getattr(_package, "VLM_DISTILL_PACKAGE", False):
        raise ImportError(
            f"another package named {_package.__name__!r} shadows the one of vlm-distill: "
            f"{getattr(_package, '__path__', _package)}. "
            "Remove it from sys.path, or put vlm-distill before it."
        )

_register_with_transformers()

if _TYPE_CHECKING:
    from shared.api import AnyConfig, Result

__all__ = ["distill"]


def distill(config: AnyConfig, *overrides: str, smoke: bool = False, quiet: bool = False) -> Result:
    """Distil a vision-language model, as `distill-vlm run` does: sample, train, export, evaluate, report.

    Called again with the same configuration it goes on where it was. docs/PYTHON.md has an example.

    Args:
        config: a `VlmRunConfig`, a mapping with its sections, or the path of a YAML file.
        *overrides: settings that replace the configuration's, as "training.rounds=1".
        smoke: every stage on a handful of samples, in a folder of its own.
        quiet: say nothing.

    Returns:
        Where run and student lie, and what the report holds.

    Raises:
        UserError: whatever the user can mend, in one message; nothing that was committed is lost.
    """
    from shared.api import distill_with  # so that importing this package stays light
    from vlm_distill.cli import MODALITY

    return distill_with(MODALITY, config, overrides, smoke=smoke, quiet=quiet)
