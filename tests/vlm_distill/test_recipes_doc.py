"""The recipe in docs/RECIPES.md: the projector learns to caption, then all but the tower is distilled."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from vlm_builders import FAMILIES, save_tiny_vlm
from vlm_distill.assembly import AssemblySpec
from vlm_distill.cli import app
from vlm_runs import write_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "RECIPES.md"


def test_each_stage_trains_its_parts_and_takes_what_the_last_one_left(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    recipe = yaml.safe_load(text)
    start, projector, student = recipe["stages"]
    AssemblySpec.model_validate(start["assemble"])
    write_rows(tmp_path, least=1)
    for seed, name in enumerate(("start", "teacher")):
        save_tiny_vlm(tmp_path / name, FAMILIES["llava"](), seed)
    projector["run"]["student"]["model"] = str(tmp_path / "start")
    student["run"]["teacher"] = {"model": str(tmp_path / "teacher"), "dtype": "float32"}
    for stage in (projector, student):
        for name, (source,) in stage["run"]["prompts"].items():
            source.update(path=f"{tmp_path}/{name}.json", image_root=f"{tmp_path}/images")
        stage["run"]["generation"] = {"max_new_tokens": 4, "batch_tokens": 400}
        stage["run"]["training"] |= {"rounds": 1, "pairs_per_step": 3, "micro_batch_tokens": 700}
    recipe |= {"stages": [projector, student], "output": f"{tmp_path}/made"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    result = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, (result.output, result.exception)

    def changed(before: Path, after: Path) -> set[str]:
        left, right = (load_file(folder / "model.safetensors") for folder in (before, after))
        return {name for name in left if not torch.equal(left[name], right[name])}

    made = tmp_path / "made"
    first = changed(tmp_path / "start", made / "projector" / "student")
    second = changed(made / "projector" / "student", made / "student" / "student")
    assert first and all(name.startswith("multi_modal_projector.") for name in first)
    assert any(name.startswith("language_model.") for name in second)
    assert not any(name.startswith("vision_tower.") for name in second)
