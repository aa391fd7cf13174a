"""Does a run of large models take the memory that `check --models` says? Real shapes, random weights.

    python benchmarks/large_shapes.py [--short] [--out FILE] [--steps N]

Each case is `configs/vlm/llava-1.5-7b-to-tinyllava.yaml` with another pair of models, a processor made here
and pictures of noise: estimated as `distill-vlm check --models --estimate` does, then trained for some
optimiser steps on responses of full and half length, then sampled from. The peaks are PyTorch's own count on
the GPU. `--short` scales the models down until a CPU can do it, and then measures no memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu_estimates import MODELS
from loss_core import DEVICE, machine
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from shared.config_files import load_config
from shared.models.references import ModelRef
from shared.preflight.calibration import measure_sampling
from shared.preflight.check import check_models
from shared.progress import Speaker
from shared.session import open_session
from shared.training.layout import made_up_group
from shared.training.loop import train_round
from shared.training.setup import open_accelerator
from shared.workspace import Workspace
from vlm_distill.adapter import VlmAdapterKind
from vlm_distill.config import VlmRunConfig

CONFIG = Path(__file__).resolve().parents[1] / "configs/vlm/llava-1.5-7b-to-tinyllava.yaml"
LLAVA, TINY = "llava-hf/llava-1.5-7b-hf", "bczhou/tiny-llava-v1-hf"
CASES = {"llava-1.5-7b to tinyllava": (LLAVA, TINY), "llava-1.5-7b to itself": (LLAVA, LLAVA)}
PAIRS_PER_STEP = 16
HELDOUT = 4
IMAGE_TOKEN = "<image>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class RandomWeights(VlmAdapterKind):
    """Models are made on the device, as their configuration says."""

    def load(self, ref: ModelRef, *, dtype: torch.dtype) -> Any:  # noqa: D102
        with torch.device(DEVICE):
            torch.manual_seed(zlib.crc32(ref.name.encode()))
            config = transformers.AutoConfig.from_pretrained(ref.name)
            return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def save_shape(name: str, folder: Path, *, small: bool) -> str:
    """A model folder without weights: configuration and processor."""
    config = MODELS[name].config
    config = type(config)(**config.to_dict())
    words = (f"w{i}" for i in range(config.text_config.vocab_size - 68))
    vocabulary = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", "<pad>", *words))}
    if small:
        for part in (config.text_config, config.vision_config):
            part.num_hidden_layers, part.hidden_size, part.intermediate_size = 4, 128, 128
            part.num_attention_heads = 4
        config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 32
    config.save_pretrained(folder)
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )  # fmt: skip
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == config.image_token_index
    side = config.vision_config.image_size
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"height": side, "width": side}, do_center_crop=False
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def write_prompts(folder: Path, count: int) -> None:
    """Questions of 100 words about a picture of noise each."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for index in range(count):
        pixels = generator.integers(0, 256, (336, 336, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        words = " ".join(f"w{i}" for i in generator.integers(10, 30_000, 100))
        question = {"from": "human", "value": f"<image>\n{words}"}
        rows.append(
            {
                "id": str(index),
                "image": f"{index}.png",
                "conversations": [question, {"from": "gpt", "value": "w9"}],
            }
        )
    (folder / "heldout.json").write_text(json.dumps(rows[:HELDOUT]))
    (folder / "train.json").write_text(json.dumps(rows[HELDOUT:]))


def config_of(teacher: str, student: str, folder: Path, *, small: bool) -> VlmRunConfig:
    """The shipped configuration on other models and prompts."""
    source = f"[{{{{path: {folder}/{{}}.json, image_root: {folder}/images, task: vqa}}}}]"
    return load_config(
        CONFIG,
        VlmRunConfig,
        [
            f"teacher.model={teacher}",
            f"student.model={student}",
            f"prompts.train={source.format('train')}",
            f"prompts.heldout={source.format('heldout')}",
            f"training.pairs_per_step={2 if small else PAIRS_PER_STEP}",
            f"output={folder}/run",
            *(["generation.max_new_tokens=8", "training.micro_batch_tokens=1500"] if small else []),
        ],
    )


def peak() -> int:
    """Bytes since the last call."""
    if DEVICE == "cpu":
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def measure(config: VlmRunConfig, folder: Path, *, steps: int, prompts: int) -> dict[str, Any]:
    """Estimate, train, sample."""
    kind = RandomWeights()
    found = check_models(config, kind, prompts=prompts, heldout=HELDOUT, estimate=True)
    assert not found.problems, found.problems
    estimated = found.facts["memory bytes"]
    always = sum(estimated["always"].values())
    expected = {when: always + sum(estimated[when].values()) for when in ("training", "sampling")}
    objective = config.objective.build(["vqa"])
    peak()
    session = open_session(
        config, kind, objective, workspace=Workspace(folder), speaker=Speaker(quiet=True),
        accelerator=open_accelerator(config.training, str(folder), config.name),
    )  # fmt: skip
    measured = {"loading": peak()}
    trainee = session.trainee
    group_of = partial(
        made_up_group, adapter=trainee.student_adapter, response_tokens=config.generation.max_new_tokens
    )
    groups = [group_of(sample) for sample in session.train_samples]
    pairs = steps * config.training.pairs_per_step
    groups = (groups * (pairs // len(groups) + 1))[:pairs]
    lines: list[dict[str, float]] = []
    began = time.perf_counter()
    train_round(
        trainee, groups, first_step=trainee.step, seed=0, on_step=lines.append,
        on_checkpoint=lambda: None, on_evaluate=lambda: None,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    measured["training"] = peak()
    for role in ("teacher", "student"):
        measure_sampling(session, role, prompts)  # type: ignore[arg-type]
    measured["sampling"] = peak()
    losses = [line["train/loss"] for line in lines]
    return {
        "steps": len(lines),
        "pairs_per_step": config.training.pairs_per_step,
        "layout": trainee.layouts.student,
        "loss_first_and_last": [round(losses[0], 4), round(losses[-1], 4)],
        "tokens_per_second": round(statistics.median(line["train/tokens_per_second"] for line in lines)),
        "seconds": round(seconds, 1),
        "expected_gib": {when: round(count / 2**30, 2) for when, count in expected.items()},
        "measured_gib": {when: round(count / 2**30, 2) for when, count in measured.items()},
        "expected_over_measured": {
            when: round(expected[when] / count, 3)
            for when, count in measured.items()
            if when in expected and count
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="models scaled down, two steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_shapes.json"))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.short:
        parser.error("models of 7 billion parameters need a GPU; --short scales them down")
    results: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "cases": {}}
    steps = 2 if arguments.short else arguments.steps
    for case, names in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prompts = steps if arguments.short else 64
            write_prompts(folder, prompts + HELDOUT)
            teacher, student = (
                save_shape(model, folder / role, small=arguments.short)
                for model, role in zip(names, ("teacher", "student"), strict=True)
            )
            (folder / "run").mkdir()
            config = config_of(teacher, student, folder, small=arguments.short)
            results["cases"][case] = measure(config, folder / "run", steps=steps, prompts=prompts)
        print(case, json.dumps(results["cases"][case]), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
