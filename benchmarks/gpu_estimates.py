"""What do the shipped GPU configurations take? Worked out from the models' dimensions alone; loads nothing.

The dimensions are those that the models' authors publish; each model is held against its published number of
parameters before it is used. Prompt lengths are assumed, because the prompts are not here: 512 tokens of
chat, 256 of code, 700 of a picture with a question.

    python benchmarks/gpu_estimates.py          # a table, and benchmarks/results/gpu_estimates.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from shared.config_files import load_config
from shared.models.references import ModelRef
from shared.models.students import make_student
from shared.objectives.objective import build_objective
from shared.preflight.needs import AS_ASKED, Plan, estimate_time, size_up
from shared.preflight.page import Findings, duration, size
from shared.preflight.sizing import outline, shape_of
from shared.preflight.survey import Readers
from text_distill.config import TextRunConfig
from vlm_distill.config import VlmRunConfig

ROOT = Path(__file__).resolve().parents[1]


class Model(NamedTuple):
    """Dimensions, and the published number of parameters that they have to give."""

    config: Any
    billions: float


def _text(kind: str, **dimensions: Any) -> Any:
    return getattr(transformers, kind)(**dimensions)


def _decoder(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }


def _llava(text: Any) -> Any:
    tower = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=32000)


def _qwen_vl(hidden: int, inner: int, layers: int, heads: int, kv: int, *, tied: bool) -> Any:
    text = _decoder(hidden, inner, layers, heads, kv, 151936 if tied else 152064)
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied
    )


MODELS = {
    "Qwen/Qwen2.5-7B-Instruct": Model(
        _text("Qwen2Config", **_decoder(3584, 18944, 28, 28, 4, 152064), tie_word_embeddings=False), 7.62
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Model(
        _text("Qwen2Config", **_decoder(1536, 8960, 28, 12, 2, 151936), tie_word_embeddings=True), 1.54
    ),
    "google/gemma-2-9b-it": Model(
        _text("Gemma2Config", **_decoder(3584, 14336, 42, 16, 8, 256000), head_dim=256), 9.24
    ),
    "google/gemma-2-2b-it": Model(
        _text("Gemma2Config", **_decoder(2304, 9216, 26, 8, 4, 256000), head_dim=256), 2.61
    ),
    "deepseek-ai/deepseek-coder-6.7b-instruct": Model(
        _text("LlamaConfig", **_decoder(4096, 11008, 32, 32, 32, 32256)), 6.74
    ),
    "deepseek-ai/deepseek-coder-1.3b-instruct": Model(
        _text("LlamaConfig", **_decoder(2048, 5504, 24, 16, 16, 32256)), 1.35
    ),
    "llava-hf/llava-1.5-7b-hf": Model(
        _llava(_text("LlamaConfig", **_decoder(4096, 11008, 32, 32, 32, 32064))), 7.06
    ),
    "bczhou/tiny-llava-v1-hf": Model(
        _llava(_text("LlamaConfig", **_decoder(2048, 5632, 22, 32, 4, 32064))), 1.41
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": Model(_qwen_vl(3584, 18944, 28, 28, 4, tied=False), 8.29),
    "Qwen/Qwen2.5-VL-3B-Instruct": Model(_qwen_vl(2048, 11008, 36, 16, 2, tied=True), 3.75),
}
RUNS = {  # prompts of a round, and assumed tokens of a prompt
    "text/qwen2.5-7b-to-1.5b": (12_800, 512),
    "text/gemma-2-9b-to-2b": (12_800, 512),
    "text/deepseek-coder-6.7b-to-1.3b": (40_000, 256),
    "vlm/llava-1.5-7b-to-tinyllava": (12_800, 700),
    "vlm/qwen2.5-vl-7b-to-3b": (12_800, 700),
}


def main() -> None:
    """Print a table and write the figures."""
    results = {}
    for name, (prompts, prompt_tokens) in RUNS.items():
        sees = name.startswith("vlm/")
        config = load_config(ROOT / f"configs/{name}.yaml", VlmRunConfig if sees else TextRunConfig)
        assert config.teacher is not None
        teacher, start = (_outline(ref.name) for ref in (config.teacher.model, config.student.model))
        student = make_student(config.student.model_copy(update={"method": "lora"}), start, seed=0)
        for name_of, parameter in student.named_parameters():
            if "vision" in name_of or "visual" in name_of:  # frozen
                parameter.requires_grad_(False)
        plan = Plan(
            config=config,
            objective=build_objective(config.objective.name, config.objective.parameters),
            readers=Readers(None, None),  # type: ignore[arg-type]
            teacher=shape_of(teacher.requires_grad_(False)),
            student=shape_of(student),
            prompts=prompts,
            heldout=256,
            prompt_tokens=prompt_tokens,
            longest=prompt_tokens,
        )
        found = Findings()
        needed = size_up(found, plan, student, on_cpu=False)
        estimate_time(found, plan, needed, AS_ASKED)
        results[name] = found.facts
        times = found.facts["seconds of a round at peak rates"]
        rounds = config.training.rounds
        cells = [
            duration(rounds * (t["sampling"] + t["training"])) if t["fits"] else "–" for t in times.values()
        ]
        sizes = [size(needed), size(sum(found.facts["disk bytes"].values()))]
        print(f"| `{name}` | {' | '.join([*sizes, *cells])} |")
    target = ROOT / "benchmarks" / "results" / "gpu_estimates.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


def _outline(name: str) -> Any:
    known = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        known.config.save_pretrained(folder)
        model = outline(ModelRef(name=folder), dtype=torch.bfloat16)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert abs(billions - known.billions) < 0.01 * known.billions, (name, billions, known.billions)
    return model


if __name__ == "__main__":
    main()
