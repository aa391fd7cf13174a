"""How do transformers' Auto classes come to know our model, and who pays for importing transformers?

`import vlm_distill` has to be enough for `AutoModelForImageTextToText` and `AutoProcessor`, and must not cost
a command line's `--help` the seconds that transformers and torch take. So the registration waits for the
import of transformers, whenever that comes.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_with_transformers() -> None:
    """Make the Auto classes know the model: now, or as soon as transformers is imported."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from vlm_distill.modeling import (
        OpenClipLlavaConfig,
        OpenClipLlavaForConditionalGeneration,
        OpenClipLlavaModel,
        OpenClipVisionConfig,
        OpenClipVisionModel,
    )
    from vlm_distill.processing import OpenClipImageProcessor, OpenClipLlavaProcessor

    for config in (OpenClipVisionConfig, OpenClipLlavaConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel, exist_ok=True)
    AutoModel.register(OpenClipLlavaConfig, OpenClipLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(
        OpenClipLlavaConfig, OpenClipLlavaForConditionalGeneration, exist_ok=True
    )
    AutoImageProcessor.register(
        OpenClipLlavaConfig,
        image_processor_classes=dict.fromkeys(("pil", "torchvision"), OpenClipImageProcessor),
        exist_ok=True,
    )
    AutoProcessor.register(OpenClipLlavaConfig, OpenClipLlavaProcessor, exist_ok=True)


class _AfterTransformers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets transformers be imported as ever, then registers. Removes itself first, so it acts once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None and module.__spec__ is not None
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
