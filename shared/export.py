"""What does a run hand over? A plain model folder, its LoRA alone, and a card that says how it came to be."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from torch import nn
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

from shared.adapter import Adapter
from shared.config import RunConfig
from shared.durable import committed_folder, write_atomically
from shared.models.loading import with_base
from shared.models.references import resolve_path
from shared.models.students import merged
from shared.training.setup import Models


def export_student(student: nn.Module, models: Models, config: RunConfig, folder: Path) -> None:
    """Write `folder/student` (merged, loadable by plain transformers) and, for a LoRA, `folder/lora`.

    The LoRA of a model that is not on disk as it is (pruned, quantised, read from GGUF, with another LoRA
    merged in) comes with its base, in `folder/lora/base`. Each folder appears by one rename, the student's
    last.

    Raises:
        UserError: the disk is full; nothing half-written remains.
    """
    if isinstance(student, PeftModel):
        with committed_folder(folder / "lora") as target:
            _write_lora(student, models, config, target)
    with committed_folder(folder / "student") as target:
        _write_model(student, models.student_adapter, target)


def write_model_card(
    folder: Path, config: RunConfig, figures: Sequence[tuple[str, str]], facts: Mapping[str, object]
) -> None:
    """Write the README.md of an exported student, and of its LoRA: origin, figures, how to load it."""
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sees = "vision_config" in model_config
    known = model_config["model_type"] in CONFIG_MAPPING_NAMES
    register = "" if known else "import vlm_distill  # makes transformers know this kind of model\n"
    load_model, load_lora = (_LOAD_VISION_MODEL, _LOAD_VISION_LORA) if sees else (_LOAD_MODEL, _LOAD_LORA)
    _write_card(folder, register + load_model, "transformers", config, figures, facts)
    lora = folder.with_name("lora")
    if lora.exists():
        _write_card(lora, register + load_lora, "peft", config, figures, facts)


_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
"""
_LOAD_LORA = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
"""
_LOAD_VISION_MODEL = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH/TO/THIS/FOLDER")
processor = AutoProcessor.from_pretrained("PATH/TO/THIS/FOLDER")
"""
_LOAD_VISION_LORA = """\
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = PeftConfig.from_pretrained("PATH/TO/THIS/FOLDER").base_model_name_or_path
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), "PATH/TO/THIS/FOLDER")
processor = AutoProcessor.from_pretrained("PATH/TO/THIS/FOLDER")
"""


def _write_card(
    folder: Path,
    code: str,
    library: str,
    config: RunConfig,
    figures: Sequence[tuple[str, str]],
    facts: Mapping[str, object],
) -> None:
    origin = config.origin.name
    front = {"library_name": library, "tags": ["distillation", "vlm-distill"]}
    if resolve_path(origin) is None:  # a hub links a model to its base
        front["base_model"] = origin
    pruned = " with fewer blocks" if config.student.prune else ""
    taught = "Trained on the reference answers of its data"
    if config.teacher is not None:
        taught = f"Distilled from `{config.teacher.model.name}`"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {config.name}",
        "",
        f"{taught} (objective `{config.objective.name}`), starting from `{origin}`{pruned}. The licence of "
        "that model applies.",
        "",
        "| figure | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in figures),
        "",
        "Measured on held-out prompts of the run; ± is one standard error.",
        "",
        f"```python\n{code}```",
        "",
        "| run | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    write_atomically(folder / "README.md", "\n".join(lines))


def _write_model(model: nn.Module, adapter: Adapter, target: Path) -> None:
    whole = merged(model)
    named = whole.config.architectures
    whole.save_pretrained(target)
    whole.config.architectures = (
        named  # saving sets it, and what training still holds would have another fingerprint
    )
    adapter.save_pretrained(target)


def _write_lora(student: PeftModel, models: Models, config: RunConfig, target: Path) -> None:
    origin = with_base(config.origin)
    path = resolve_path(origin.name)
    peft_config = student.peft_config["default"]
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    base_moved = any("lora_" not in name for name in trained)  # a projector that is trained in full
    found = origin.lora is None and origin.quantization is None and (path is None or path.is_dir())
    as_it_is = models.kept_layers is None and found and not base_moved
    if as_it_is:
        peft_config.base_model_name_or_path = origin.name if path is None else str(path.resolve())
        peft_config.revision = origin.revision
    else:
        base: Any = copy.deepcopy(student).unload()
        _write_model(base, models.student_adapter, target / "base")
        peft_config.base_model_name_or_path = str(target.with_name("lora").resolve() / "base")
    # the embeddings are not trained, so there is nothing to look up on a hub
    student.save_pretrained(str(target), save_embedding_layers=False)
    models.student_adapter.save_pretrained(target)
