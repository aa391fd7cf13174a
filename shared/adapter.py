"""The seam between modalities: what an adapter is, and how the one for a model is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shared.errors import UserError
from shared.types import Encoded, Group, Layout, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from shared.additions import Additions
    from shared.config_models import StudentConfig
    from shared.models.references import ModelRef
    from shared.models.vocabulary import Vocabulary
    from shared.session import Session

ENTRY_POINT_GROUP = "vlm_distill.adapters"


class Adapter(Protocol):
    """The only thing that knows a modality: one per model, without weights, picklable."""

    fingerprint: str  # of processor, template and preprocessing
    vocabulary: Vocabulary
    accepts_images: bool  # False: a sample with images is refused

    def prompt_tokens(self, sample: Sample) -> int:
        """How many tokens the rendered prompt takes in this model."""
        ...

    def encode_prompts(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """Left-padded inputs for generation."""
        ...

    def encode(self, groups: Sequence[Group], *, layout: Layout) -> Encoded:
        """Prompts and responses for one forward pass.

        Raises:
            AlignmentError: a response without tokens, or with a token that this model does not have.
        """
        ...

    def check(self, groups: Sequence[Group], encoded: Encoded) -> None:
        """An encoding must hold these samples' own prompts, as this model reads them.

        Raises:
            AlignmentError: naming the sample and what is not its own.
        """
        ...

    def encode_text(self, text: str, *, stop: bool) -> tuple[int, ...]:
        """Token ids of an answer given as text, ending with the turn's end if `stop`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        ...

    def describe(self, sample: Sample) -> str:
        """The rendered prompt, for a person to read."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write tokenizer, processor and chat template beside an exported model."""
        ...


class AdapterKind(Protocol):
    """What an entry point gives: opens adapters and loads models of one modality."""

    def claims(self, model_config: Mapping[str, object]) -> bool:
        """Whether a model with this configuration is of this modality."""
        ...

    def open(self, ref: ModelRef, options: Mapping[str, object]) -> Adapter:
        """The adapter of a model."""
        ...

    def load(self, ref: ModelRef, *, dtype: torch.dtype) -> nn.Module:
        """The model's weights, in eval mode, on the CPU."""
        ...

    def make_student(
        self,
        config: StudentConfig,
        start: PreTrainedModel,
        adapter: Adapter,
        samples: Sequence[Sample],
        *,
        seed: int,
    ) -> nn.Module:
        """What is trained, made of the model that the student starts from.

        Args:
            config: the run's `student`.
            start: left as it is.
            adapter: the student's.
            samples: prompts of the run, for what depends on them.
            seed: of low-rank updates.

        Raises:
            UserError: modules or parts that the model does not have.
        """
        ...

    def additions(self, session: Session) -> Additions:
        """What this modality adds to a run, as its configuration asks; called once its models are there.

        Raises:
            UserError: what cannot be done with these models.
        """
        ...


def adapter_kinds() -> dict[str, AdapterKind]:
    """All installed modalities, by the name of their entry point."""
    return {entry.name: entry.load()() for entry in entry_points(group=ENTRY_POINT_GROUP)}


def adapter_kind_for(model_config: Mapping[str, object]) -> AdapterKind:
    """The modality that claims a model.

    Raises:
        UserError: none does, or several do.
    """
    kinds = adapter_kinds()
    claiming = [name for name, kind in kinds.items() if kind.claims(model_config)]
    if len(claiming) != 1:
        raise UserError(
            f"model type {model_config.get('model_type')!r} is claimed by {claiming or 'no adapter'}; "
            f"installed adapters: {', '.join(sorted(kinds)) or 'none'}. "
            "Use a model that exactly one of them reads."
        )
    return kinds[claiming[0]]
