"""Which prompts does a run train on, and which does it hold out?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shared.config_data import PromptsConfig, PromptSource
from shared.data.decontamination import decontaminate, evaluation_texts, prompt_texts
from shared.data.image_references import Handling, in_folder
from shared.data.prompts import load_prompts
from shared.errors import DataError
from shared.objectives.objective import Objective
from shared.types import Sample


class RunPrompts(NamedTuple):
    """No sample is in both."""

    train: list[Sample]
    heldout: list[Sample]
    notes: list[str]  # what was left out, for the log


def load_run_prompts(
    config: PromptsConfig, objective: Objective, *, seed: int, folder: Path | None = None
) -> RunPrompts:
    """Read both sets.

    Args:
        config: Where they are.
        objective: Says whether reference answers are needed.
        seed: Of the shuffles.
        folder: Of the run. It keeps images that are no local files, and every image is decoded once; it has
            what the teacher wrote. None: the samples are only looked at, so images are tested by their
            headers, none is fetched, and others stand in for prompts that the teacher is to write.

    Raises:
        DataError: rows that cannot be used, a prompt in both sets, or one without the reference answer that
            the objective trains on.
        UserError: a file that does not exist.
    """
    images = Handling(config.images)
    if folder is not None:
        kept = folder / "images"
        images = Handling(config.images, in_folder(kept), look="decode", downloads=kept)
        config = _from_files(config, folder)
    (train, notes), (heldout, more) = (
        load_prompts(sources, seed=seed, on_bad_row=config.on_bad_row, images=images, beside=beside)
        for sources, beside in ((config.train, ()), (config.heldout, config.train))
    )
    both = {sample.id for sample in train} & {sample.id for sample in heldout}
    if both:
        raise DataError(
            f"{len(both)} prompts are in prompts.train and prompts.heldout ({', '.join(sorted(both)[:3])}). "
            "Figures on them would not be held out: take them out of one. Of one file, the first are held "
            "out by `shuffle: true, limit: 100`, and the others trained on by `shuffle: true, skip: 100`."
        )
    notes += more
    if config.decontamination is not None:
        wanted = config.decontamination
        texts = [*evaluation_texts(wanted.against)]
        if wanted.heldout:
            texts += prompt_texts(heldout, "prompts.heldout")
        clean = decontaminate(train, texts, n=wanted.ngram)
        train = clean.kept
        notes += clean.notes()
    missing = [sample.source for sample in train if not sample.reference]
    if missing and "reference" in objective.sides:
        raise DataError(
            f"objective {objective.name!r} trains on reference answers, and {len(missing)} prompts have none "
            f"({', '.join(missing[:3])}). Add a `reference` to each row, or choose another objective."
        )
    return RunPrompts(train, heldout, notes)


def written_file(folder: Path, place: str) -> Path:
    """Where a run keeps the prompts that its teacher wrote for a source."""
    return folder / "prompts" / f"{place}.jsonl"


def _from_files(config: PromptsConfig, folder: Path) -> PromptsConfig:
    """The same prompts, those that the teacher wrote as the files that they are in."""
    written = config.written

    def files(name: str, sources: tuple[PromptSource, ...]) -> tuple[PromptSource, ...]:
        return tuple(
            source.model_copy(update={"path": str(written_file(folder, place)), "written": None})
            if (place := f"{name}.{index}") in written
            else source
            for index, source in enumerate(sources)
        )

    return config.model_copy(
        update={"train": files("train", config.train), "heldout": files("heldout", config.heldout)}
    )
