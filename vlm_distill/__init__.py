"""Vision-language distillation: the adapter for models that see, their assembly, and their command line.

Importing it makes transformers' Auto classes know the models assembled here; see `registration`.
"""

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
