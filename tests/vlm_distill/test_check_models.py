"""What two vision-language models tell before a run: image tokens, alignment, distance to themselves."""

from __future__ import annotations

import json

from assembly_specs import assembly
from shared.config_files import parse_config
from shared.preflight.check import check_models
from vlm_builders import llava, picture, qwen2_5_vl, save_tiny_vlm
from vlm_distill.adapter import VlmAdapterKind
from vlm_distill.assembly import assemble
from vlm_distill.config import VlmRunConfig


def configuration(folder, teacher: str, student: str, *, micro_batch_tokens: int = 4096) -> VlmRunConfig:
    """A run in a folder that holds both models and both prompt files."""
    return parse_config(
        f"""
        name: seen
        output: {folder}/run
        teacher: {{model: {folder}/{teacher}, dtype: float32}}
        student: {{model: {folder}/{student}, parts: {{tower: frozen}}}}
        prompts: {{train: [{{path: {folder}/train.jsonl}}], heldout: [{{path: {folder}/heldout.jsonl}}]}}
        generation: {{max_new_tokens: 4}}
        training: {{pairs_per_step: 4, learning_rate: 1e-3, micro_batch_tokens: {micro_batch_tokens}}}
        """,
        VlmRunConfig,
    )


def test_models_of_different_families_are_compared_and_measured(tmp_path):
    save_tiny_vlm(tmp_path / "teacher", qwen2_5_vl())
    save_tiny_vlm(tmp_path / "student", llava())
    (tmp_path / "images").mkdir()
    for index in range(3):
        picture(index, (24, 24)).save(tmp_path / "images" / f"{index}.png")
    for name, offset in (("train", 0), ("heldout", 4)):
        rows = [
            {"prompt": f"{name} {index} what?", "image": f"images/{index % 3}.png", "reference": "noise"}
            for index in range(offset, offset + 4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration(tmp_path, "teacher", "student", micro_batch_tokens=200)
    found = check_models(config, VlmAdapterKind(), prompts=4, heldout=4, estimate=False)
    assert not found.problems, found.problems
    assert found.facts["student's tokens per image"] == 16  # a square of 4 x 4
    assert found.facts["teacher's tokens per image"] == 9  # 24 pixels in patches of 4, merged by twos
    columns = next(topic.columns for topic in found.topics if topic.columns)
    assert "image 1     the whole picture, 3 x 3 cells" in columns["teacher"]
    assert "image 1     the whole picture, 4 x 4 cells" in columns["student"]
    distances = [value for key, value in found.facts.items() if key.startswith("distance to itself")]
    assert len(distances) == 4 and max(distances) < 1e-4
    assert found.facts["seconds of a round"]["training"] > 0
    assert not (tmp_path / "run").exists()


def test_an_assembled_model_is_sized_and_measured_by_its_parts(tmp_path):
    assemble(assembly("resnet"), tmp_path / "model", seed=0)
    picture().save(tmp_path / "0.png")
    for name in ("train", "heldout"):
        row = {"prompt": f"{name}: is it red?", "image": "0.png"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    config = configuration(tmp_path, "model", "model")
    found = check_models(config, VlmAdapterKind(), prompts=1, heldout=1, estimate=False)
    assert not found.problems, found.problems
    distances = [value for key, value in found.facts.items() if key.startswith("distance to itself")]
    assert distances and max(distances) < 1e-4
