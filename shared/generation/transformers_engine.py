"""How does a transformers model in this process make responses: one planned batch through its own `generate`.

The model's `generate` and key-value cache do the work, so every architecture that transformers knows is
served as it knows it. Only the choice of each token is ours (`shared.generation.sampling`): it enters as a
logits processor that leaves the chosen token as the largest.

Shapes: B responses of a batch, T tokens, V the model's vocabulary width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from shared.errors import UserError
from shared.generation.sampling import sample_tokens, uniforms
from shared.models.vocabulary import Vocabulary
from shared.types import Request, Response, Sample, Sampling


class PromptReader(Protocol):
    """What an engine needs of an adapter."""

    fingerprint: str
    vocabulary: Vocabulary
    accepts_images: bool

    def encode_prompts(self, samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        """Left-padded inputs for generation."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        ...


SAMPLER = 1  # part of the fingerprint; raise it where the same settings would sample other tokens


class TransformersEngine:
    """Generates with a model in this process, on the device where it lies.

    Args:
        model: A causal model of transformers, or a peft model around one.
        adapter: Encodes prompts for this model and decodes its responses.
        fingerprint: Identifies the model's weights.
        width: Ids from here on are never sampled: those that the other model of a pair does not have.
        excluded_ids: Further ids that are never sampled, such as image placeholders and padding.
    """

    returns_token_ids = True

    def __init__(
        self,
        model: nn.Module,
        adapter: PromptReader,
        *,
        fingerprint: str,
        width: int | None = None,
        excluded_ids: Sequence[int] = (),
    ) -> None:
        stop_ids = tuple(adapter.vocabulary.stop_ids)
        unusable = [i for i in stop_ids if i in set(excluded_ids) or (width is not None and i >= width)]
        assert not unusable, f"stop ids {unusable} can never be sampled (width {width})"
        self.accepts_images = adapter.accepts_images
        self._model = model
        self._adapter = adapter
        self._width = width
        self._excluded_ids = sorted(excluded_ids)
        self._stop_ids = stop_ids
        self.fingerprint = _digest(
            [
                fingerprint,
                adapter.fingerprint,
                str(_dtype(model)),
                width,
                self._excluded_ids,
                stop_ids,
                SAMPLER,
            ]
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Response]:
        """Run the requests as one batch; yields in their order once the batch is done.

        Raises:
            UserError: the model's logits are NaN or infinite; the message names a sample.
        """
        if not requests:
            return
        sequences = self._generate_ids(requests, sampling)
        fingerprint = _digest([self.fingerprint, asdict(sampling)])
        for request, row in zip(requests, sequences, strict=True):
            length = next((at + 1 for at, token in enumerate(row) if token in self._stop_ids), None)
            token_ids = tuple(row[:length])
            yield Response(
                sample_id=request.sample.id,
                role=request.role,
                round=request.round,
                draw=request.draw,
                token_ids=token_ids,
                text=self._adapter.decode(token_ids),
                finish_reason="length" if length is None else "stop",
                fingerprint=fingerprint,
            )

    def _generate_ids(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        base = _transformers_model(self._model)
        device = next(base.parameters()).device
        inputs = {
            name: value.to(device)
            for name, value in self._adapter.encode_prompts([request.sample for request in requests]).items()
        }
        prompt_length = inputs["input_ids"].shape[1]
        choose = _ChooseToken(
            requests, sampling, prompt_length, device, width=self._width, excluded_ids=self._excluded_ids
        )
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self._stop_ids),
            pad_token_id=self._stop_ids[0],  # fills finished rows, which are cut at their first stop token
        )
        with torch.inference_mode(), _ready_to_generate(base):
            sequences_BT = cast(
                Tensor,
                base.generate(  # type: ignore[operator]  # transformers types it by overloads of its own
                    **inputs, generation_config=config, logits_processor=LogitsProcessorList([choose])
                ),
            )
        return sequences_BT[:, prompt_length:].tolist()


class _ChooseToken(LogitsProcessor):
    """Makes the sampled token the largest logit; greedy where the temperature is 0."""

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        prompt_length: int,
        device: torch.device,
        *,
        width: int | None,
        excluded_ids: Sequence[int],
    ) -> None:
        self._requests = requests
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._width = width
        self._excluded = torch.tensor(excluded_ids, dtype=torch.long, device=device)
        if sampling.temperature > 0:
            noise_BS = uniforms(requests, seed=sampling.seed, steps=sampling.max_new_tokens)
            # Apple's GPUs have no float64
            self._uniforms_BS = noise_BS.to("cpu" if device.type == "mps" else device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # names given by transformers
        """Takes `scores` (B, V), a float32 copy made for logits processors, and changes it in place."""
        finite_B = scores.amax(-1).isfinite()
        if not finite_B.all():
            broken = self._requests[int(finite_B.logical_not().nonzero()[0])]
            raise UserError(
                f"the {broken.role}'s logits are NaN or infinite for sample {broken.sample.id!r} "
                f"({broken.sample.source}). Load the model in a wider dtype (bfloat16 instead of float16, or "
                "float32), or check its weights."
            )
        if self._width is not None:
            scores[:, self._width :] = -torch.inf
        scores[:, self._excluded[self._excluded < scores.shape[1]]] = -torch.inf
        if self._sampling.temperature == 0:
            return scores
        step = input_ids.shape[1] - self._prompt_length
        tokens_B = sample_tokens(
            scores.to(self._uniforms_BS.device),
            self._uniforms_BS[:, step],
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
        )
        return scores.scatter_(1, tokens_B.to(scores.device)[:, None], torch.inf)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The model below a peft wrapper: low-rank updates sit inside its layers, and it has `generate`."""
    unwrap = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if unwrap is None else unwrap())


@contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode (checkpointed layers keep no cache in training mode) and no generation settings but ours.

    `generate` fills every setting that a call leaves open from the model's own generation config: repetition
    penalties, forced and suppressed tokens, other stop tokens.
    """
    training = [module for module in model.modules() if module.training]
    own_config = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own_config
        for module in training:
            module.training = True


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
