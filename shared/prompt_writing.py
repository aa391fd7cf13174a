"""How does a run's teacher come to write prompts: what it is given, and where they are kept?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from shared.adapter import Adapter
from shared.config import RunConfig
from shared.config_data import PromptSource
from shared.data.run_prompts import written_file
from shared.data.teacher_written import Continue, save_prompts, user_turn, write_prompts
from shared.errors import UserError
from shared.generation.collect import collect_responses
from shared.generation.transformers_engine import TransformersEngine
from shared.progress import Speaker
from shared.training.setup import Models
from shared.types import Message, Request, Response, Sample, Sampling, TextPart
from shared.workspace import Workspace

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


class UserTurnReader:
    """What an engine needs of an adapter, where every prompt is the template up to the user's text.

    Args:
        adapter: The teacher's.
        sample: A chat without its user turn: a system turn, or nothing. The start of every prompt.

    Raises:
        UserError: a template without a user turn that begins and ends with something of its own.
    """

    accepts_images = False

    def __init__(self, adapter: Adapter, sample: Sample) -> None:
        turn = user_turn(
            lambda message: adapter.describe(replace(sample, messages=(*sample.messages, message)))
        )
        special, after = adapter.vocabulary.special_ids, adapter.encode_text(turn.after, stop=False)
        end = next((index for index in after if index in special), None)
        if end is None:
            raise UserError(
                f"the teacher's chat template ends a user's turn with {turn.after!r}, which has no special "
                "token, so nobody can tell where a prompt ends that the teacher writes. Give prompts as a "
                "file instead."
            )
        self.prompt_ids = adapter.encode_text(turn.before, stop=False)
        self.vocabulary = replace(
            adapter.vocabulary, stop_ids=tuple(sorted({*adapter.vocabulary.stop_ids, end}))
        )
        self.fingerprint = _digest([adapter.fingerprint, *turn])
        self.decode = adapter.decode

    def encode_prompts(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """The same prompt for all: (B, T)."""
        import torch

        input_ids_BT = torch.tensor([self.prompt_ids] * len(samples))
        return {"input_ids": input_ids_BT, "attention_mask": torch.ones_like(input_ids_BT)}


def write_prompts_of(
    config: RunConfig, models: Models, *, workspace: Workspace, speaker: Speaker, accelerator: Accelerator
) -> None:
    """Have the teacher write what the configuration wants of it, or go on where it was.

    What the teacher draws is kept in stores by all that makes it: nothing is lost or drawn twice, and other
    settings draw anew. The prompts are chosen from the draws each time.

    Raises:
        UserError: a template that the teacher cannot go on from, or too few good prompts.
    """
    earlier: list[str] = []
    for place, source in config.prompts.written.items():
        draw = _drawing(
            place, source, config, models, workspace=workspace, speaker=speaker, accelerator=accelerator
        )
        written = write_prompts(draw, source, earlier=earlier)
        earlier += written.prompts.values()
        speaker.say(f"  prompts.{place}: {written.note()}")
        if accelerator.is_main_process:
            save_prompts(written_file(workspace.folder, place), written, name=f"written-{place}")
        accelerator.wait_for_everyone()


def _drawing(
    place: str,
    source: PromptSource,
    config: RunConfig,
    models: Models,
    *,
    workspace: Workspace,
    speaker: Speaker,
    accelerator: Accelerator,
) -> Continue:
    """How the teacher draws for a source."""
    wanted = source.written
    assert wanted is not None and models.teacher is not None
    system = () if source.system is None else (Message("system", (TextPart(source.system),)),)
    sample = Sample(f"written-{place}", system, source=f"prompts.{place}")
    reader = UserTurnReader(models.teacher_adapter, sample)
    engine = TransformersEngine(
        models.teacher,
        reader,
        fingerprint=models.teacher_fingerprint,
        width=models.teacher_adapter.vocabulary.size,
    )
    sampling = Sampling(
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        seed=config.seed,
    )
    batch_tokens = config.generation.batch_tokens
    made_by = _digest([engine.fingerprint, asdict(sampling), batch_tokens])
    stores = written_file(workspace.folder, place).with_suffix("") / made_by

    def draw(draws: Sequence[int]) -> list[Response]:
        folder = stores / f"{draws[0]:06d}-{draws[-1]:06d}"
        with speaker.bar(f"prompts.{place}") as bar:
            return collect_responses(
                engine,
                [Request(sample, "teacher", 0, draw) for draw in draws],
                sampling,
                folder=folder,
                prompt_tokens=lambda _: len(reader.prompt_ids),
                batch_tokens=batch_tokens,
                progress=lambda p: bar(
                    p.batches_done, p.batches_total, f"{p.tokens_per_second:.0f} tokens/s"
                ),
                beside=workspace.beside(folder),
                process=accelerator.process_index,
                processes=accelerator.num_processes,
                barrier=accelerator.wait_for_everyone,
            )

    return draw


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
