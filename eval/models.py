"""What is asked? A model in this process or behind a server, opened as an engine with what planning needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pydantic import ValidationError

from shared.adapter import Adapter, adapter_kind_for
from shared.errors import ConfigError, UserError
from shared.generation.engine import Engine
from shared.models.loading import read_model_config
from shared.models.references import SERVER_SCHEME, ModelRef, ServerRef, parse_server
from shared.types import Request, Response, Sample, Sampling, Usage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Opened(NamedTuple):
    """A model that can be asked. `context` is None where its length is not known."""

    name: str
    engine: Engine
    prompt_tokens: Callable[[Sample], int]
    context: int | None
    details: Mapping[str, Any]  # what a reader of the figures must know: dtype, device
    local: Local | None = None  # None behind a server


class Local(NamedTuple):
    """A model in this process, for what needs more of it than replies."""

    model: PreTrainedModel
    adapter: Adapter


def open_model(
    name: str,
    options: Mapping[str, Any],
    *,
    dtype: str = "auto",
    device: str | None = None,
) -> Opened:
    """Open a model as run configurations name them, or a server as `server:URL#MODEL`.

    Args:
        name: Hub id, folder, GGUF file, `pkg://PACKAGE/FILE`, or a server.
        options: Further fields of the reference, such as `lora` or `system_prompt`.
        dtype: Of a local model; `auto` is bfloat16 on a GPU and float32 elsewhere.
        device: Where a local model runs; None takes a GPU where there is one.

    Raises:
        UserError: no such model, or an option that it does not have.
    """
    if name.startswith(SERVER_SCHEME):
        return _open_server(name, options)
    ref = _reference(ModelRef, {"name": name, **options})
    kind = adapter_kind_for(read_model_config(ref))
    adapter = kind.open(ref, {})

    import torch

    from shared.generation.transformers_engine import TransformersEngine
    from shared.models.teachers import fingerprint_of_model

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number_format = _dtype(dtype, where)
    model: Any = kind.load(ref, dtype=number_format).to(where)
    engine = TransformersEngine(
        model,
        adapter,
        fingerprint=fingerprint_of_model(model),
        width=adapter.vocabulary.size,  # a padded head has rows that are no tokens
    )
    return opened_local(name, Local(model, adapter), engine)


def opened_local(name: str, local: Local, engine: Engine) -> Opened:
    """A model of this process behind its engine."""
    model, adapter = local
    return Opened(
        name=name,
        engine=TimedEngine(engine, adapter.prompt_tokens),
        prompt_tokens=adapter.prompt_tokens,
        context=getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None),
        details={"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type},
        local=local,
    )


class TimedEngine:
    """An engine that tells what each response cost; a batch's seconds are shared equally."""

    def __init__(self, engine: Engine, prompt_tokens: Callable[[Sample], int]) -> None:
        self.fingerprint = engine.fingerprint
        self.returns_token_ids = engine.returns_token_ids
        self.accepts_images = engine.accepts_images
        self._engine = engine
        self._prompt_tokens = prompt_tokens

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Response]:
        """The engine's responses with their usage."""
        started = time.perf_counter()
        responses = list(self._engine.generate(requests, sampling))
        seconds = (time.perf_counter() - started) / max(1, len(responses))
        for request, response in zip(requests, responses, strict=True):
            usage = Usage(self._prompt_tokens(request.sample), len(response.token_ids), seconds)
            yield replace(response, usage=usage)


def require_images(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a model that is not shown images, before data and weights are read.

    Raises:
        UserError: a text model, or a server of which nothing says that it takes images.
    """
    if name.startswith(SERVER_SCHEME):
        if not _server(name, options).accepts_images:
            raise UserError(
                f"{name} is to be asked about images, and nothing says that it takes any. If it does: "
                "model.accepts_images=true."
            )
        return
    ref = _reference(ModelRef, {"name": name, **options})
    if not adapter_kind_for(read_model_config(ref)).open(ref, {}).accepts_images:
        raise UserError(
            f"{name} is a text model, and the task shows images. Name a vision-language model (its adapter "
            "must be installed), or set images=removed for the control without images."
        )


def _open_server(name: str, options: Mapping[str, Any]) -> Opened:
    from shared.generation.openai_engine import OpenAIEngine

    ref = _server(name, options)
    engine = OpenAIEngine(ref)
    return Opened(name, engine, engine.prompt_tokens, None, {"server": ref.url})


def _server(name: str, options: Mapping[str, Any]) -> ServerRef:
    short = parse_server(name)
    return cast(ServerRef, _reference(ServerRef, {"url": short.url, "model": short.model, **options}))


def _reference(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"model.{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        known = ", ".join(field for field in kind.model_fields if field not in ("name", "url", "model"))
        raise ConfigError(f"{problems}. Known for this model: {known}.") from None


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(f"--dtype {name!r} is unknown. Known: auto, {', '.join(known)}.")
    return known[name]
