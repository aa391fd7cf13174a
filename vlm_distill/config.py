"""What can a vision-language run be configured with? The shared sections; its own parts are added here."""

from __future__ import annotations

from shared.config import RunConfig


class VlmRunConfig(RunConfig):
    """One vision-language distillation run: `distill-vlm run CONFIG`."""
