"""A vision-language run from LLaVA JSON to report, with teacher and student of different families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shared.progress import Speaker
from shared.run import Run
from vlm_builders import FAMILIES, llava, save_tiny_vlm
from vlm_distill.adapter import VlmAdapterKind
from vlm_distill.config import VlmRunConfig
from vlm_runs import rows_of, vlm_config, write_rows


def execute(config: VlmRunConfig, evaluate=None) -> None:
    from eval.run_stage import evaluate_run

    run = Run(config, VlmAdapterKind(), evaluate=evaluate or evaluate_run, speaker=Speaker(quiet=True))
    run.execute()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("paligemma",)])
def test_a_family_distilled_into_itself_has_nothing_to_learn(tmp_path: Path, name: str) -> None:
    model = save_tiny_vlm(tmp_path / "model", FAMILIES[name]())
    config = vlm_config(tmp_path, model, model, "training.rounds=1", "training.learning_rate=1e-4")
    run = Run(config, VlmAdapterKind(), evaluate=None, speaker=Speaker(quiet=True))
    run.execute("train")
    steps = [row for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(0.0, abs=1e-6)
    assert steps[0]["train/grad_norm"] == pytest.approx(0.0, abs=1e-3)  # of other teachers: 1 and more


def test_a_prefix_model_distilled_into_itself_has_nothing_to_learn(tmp_path: Path) -> None:
    """PaliGemma's processor takes no prompt without an image."""
    model = save_tiny_vlm(tmp_path / "model", FAMILIES["paligemma"]())
    write_rows(tmp_path, least=1)
    config = vlm_config(tmp_path, model, model, "training.rounds=1", "training.learning_rate=1e-4")
    run = Run(config, VlmAdapterKind(), evaluate=None, speaker=Speaker(quiet=True))
    run.execute("train")
    steps = [row for row in rows_of(tmp_path / "run") if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("qwen2_5_vl", "llava"), ("llava_next", "smolvlm"), ("internvl", "gemma3"), ("llava", "llava@24")],
)
def test_families_and_resolutions_teach_each_other(tmp_path: Path, teacher: str, student: str) -> None:
    def build(name: str):
        return llava(24) if name == "llava@24" else FAMILIES[name]()

    config = vlm_config(
        tmp_path,
        save_tiny_vlm(tmp_path / "teacher", build(teacher), seed=1),
        save_tiny_vlm(tmp_path / "student", build(student), seed=2),
    )
    execute(config)
    folder = tmp_path / "run"
    kl = [row["heldout/kl"] for row in rows_of(folder) if "heldout/kl" in row]
    assert kl[-1] < kl[0]
    report = json.loads((folder / "report.json").read_text())
    assert report["scores"]["student"] and (folder / "report.html").exists()
    card = (folder / "student" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "import vlm_distill" not in card
    # what comes out loads by plain transformers, processor and all
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert AutoProcessor.from_pretrained(folder / "student").image_processor is not None
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (tmp_path / "student", folder / "student")
    )
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("vision" in key for key in moved) and any("lm_head" in key for key in moved)


def test_the_report_shows_images_beside_the_answers(tmp_path: Path, chromium) -> None:
    model = save_tiny_vlm(tmp_path / "teacher", FAMILIES["llava"](), seed=1)
    questions = [
        {"id": f"q{index}", "question": "Which?", "answer": "it", "image": f"images/{index % 4}.png"}
        for index in range(4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = f"{{name: easy_vqa, data: {{path: {tmp_path}/questions.jsonl}}, max_new_tokens: 2}}"
    execute(vlm_config(tmp_path, model, model, "training.rounds=1", f"evaluation.tasks=[{task}]"))
    chromium.open(tmp_path / "run" / "report.html")
    titles = chromium.run(
        "[...document.querySelectorAll('section:has(.browser) h2')].map((h) => h.innerText)"
    )
    assert titles == ["Samples", "Held-out answers"]
    # the held-out rows have one, no and two images
    steps = (
        "[...document.querySelectorAll('.browser')].map((browser) => [0, 1, 2].map((place) => {"
        "browser.querySelectorAll('.row')[place].click();"
        "return [[...browser.querySelectorAll('.images img')].length,"
        "[...browser.querySelectorAll('.answers > section')].filter((s) => !s.hidden).length]}))"
    )
    assert chromium.run(steps) == [[[1, 3]] * 3, [[1, 3], [0, 3], [2, 3]]]
    pictures = "[...document.querySelectorAll('.images img')]"
    widths = f"Promise.all({pictures}.map((i) => i.decode().then(() => i.naturalWidth)))"
    assert sorted(chromium.run(widths)) == [24, 28, 32]  # those of the chosen rows, as they are
    assert chromium.errors == []


def test_a_missing_image_names_its_row_before_a_model_is_loaded(tmp_path: Path) -> None:
    from shared.errors import DataError

    config = vlm_config(tmp_path, tmp_path / "teacher", tmp_path / "student")
    (tmp_path / "images" / "0.png").unlink()
    from shared.data.run_prompts import load_run_prompts
    from shared.objectives.objective import build_objective

    with pytest.raises(DataError, match=r"train.json:\d.*0\.png"):
        load_run_prompts(config.prompts, build_objective("distillm2", {}), seed=0)


def test_low_rank_updates_of_one_part_are_loaded_as_their_card_says(tmp_path: Path) -> None:
    """The projector is trained in full beside them, so the LoRA brings a base with the trained one along."""
    model = save_tiny_vlm(tmp_path / "teacher", FAMILIES["llava"](), seed=1)
    parts = "student.parts={tower: frozen, projector: full, language_model: lora}"
    config = vlm_config(
        tmp_path, model, model, parts, "student.lora={r: 4, dropout: 0}", "generation.temperature=0.9"
    )
    execute(config)
    folder = tmp_path / "run"
    code = (folder / "lora" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("PATH/TO/THIS/FOLDER", str(folder / "lora")), names)  # our own template
    merged = names["model"].merge_and_unload().state_dict()
    from transformers import AutoModelForImageTextToText

    exported = AutoModelForImageTextToText.from_pretrained(folder / "student").state_dict()
    start = AutoModelForImageTextToText.from_pretrained(model).state_dict()
    assert merged.keys() == exported.keys()
    for key, value in exported.items():
        assert torch.allclose(merged[key], value, atol=1e-6), key
        if "vision_tower" in key:
            assert torch.equal(value, start[key]), key
    assert any("projector" in key and not torch.equal(exported[key], start[key]) for key in exported)


def test_a_cached_teacher_with_images_teaches_what_it_would_in_memory(tmp_path: Path) -> None:
    teacher = save_tiny_vlm(tmp_path / "teacher", FAMILIES["qwen2_5_vl"](), seed=1)
    student = save_tiny_vlm(tmp_path / "student", FAMILIES["llava"](), seed=2)
    losses = []
    for name, cache in (("dense", "null"), ("cached", "{top_k: 100000}")):
        settings = ("objective.name=kd", "training.rounds=1", f"teacher.cache={cache}")
        config = vlm_config(tmp_path, teacher, student, *settings, f"output={tmp_path}/{name}")
        Run(config, VlmAdapterKind(), evaluate=None, speaker=Speaker(quiet=True)).execute("train")
        losses.append([row["train/loss"] for row in rows_of(tmp_path / name) if "train/loss" in row])
    assert losses[0] and losses[1] == pytest.approx(losses[0], rel=2e-3)
