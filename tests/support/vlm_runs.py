"""A whole vision-language run on tiny models, for tests: LLaVA JSON with pictures, configuration."""

from __future__ import annotations

import json
from pathlib import Path

from runs import no_evaluation
from shared.config_files import parse_config
from shared.progress import Speaker
from shared.run import Run
from vlm_builders import picture
from vlm_distill.adapter import VlmAdapterKind
from vlm_distill.config import VlmRunConfig

MIXED_IMAGES = (1, 0, 2, 1, 1, 2)


def write_rows(folder: Path, *, least: int = 0) -> None:
    """LLaVA JSON with no, one and two images a row."""
    (folder / "images").mkdir(parents=True)
    for index in range(4):
        picture(index, (24 + 4 * index, 20)).save(folder / "images" / f"{index}.png")
    for name, offset, count in (("train", 0, 6), ("heldout", 6, 3)):
        rows = []
        for index in range(offset, offset + count):
            images = max(least, MIXED_IMAGES[index % len(MIXED_IMAGES)])
            rows.append(
                {
                    "id": f"row-{index}",
                    "image": [f"{(index + k) % 4}.png" for k in range(images)],
                    "conversations": [
                        {"from": "human", "value": "<image>\n" * images + f"What is it? {index}"},
                        {"from": "gpt", "value": f"a thing {index}"},
                    ],
                }
            )
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def vlm_config(folder: Path, teacher: Path, student: Path, *overrides: str, least: int = 0) -> VlmRunConfig:
    """Two rounds of two steps; writes the rows if they are missing."""
    if not (folder / "train.json").exists():
        write_rows(folder, least=least)
    text = f"""
        name: tiny
        output: {folder}/run
        teacher: {{model: {teacher}, dtype: float32}}
        student: {{model: {student}}}
        prompts:
          train: [{{path: {folder}/train.json, image_root: {folder}/images, task: vqa}}]
          heldout: [{{path: {folder}/heldout.json, image_root: {folder}/images, task: vqa}}]
        generation: {{max_new_tokens: 4, batch_tokens: 400}}
        training: {{rounds: 2, pairs_per_step: 3, micro_batch_tokens: 700, learning_rate: 5e-3}}
    """
    return parse_config(text, VlmRunConfig, overrides)


def vlm_run(config: VlmRunConfig) -> Run:
    """A run that is ready to execute and says nothing; it has no evaluation."""
    return Run(config, VlmAdapterKind(), evaluate=no_evaluation, speaker=Speaker(quiet=True))


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
