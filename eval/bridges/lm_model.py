"""How does lm_eval see a model of ours? As one of its own, whose every answer is made and stored by us."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from eval.bridges.asking import Asker, Document, Generation
from shared.errors import UserError
from shared.types import Message, TextPart

LIKELIHOOD_TOKENS = 2048  # a row of a batch is taken to be as long as this, or as the context


class AskedModel(LM):  # type: ignore[misc]  # a class of a package that need not be there
    """One model for one task.

    Args:
        asker: Makes and stores.
        chat: Whether contexts come as chats, from `apply_chat_template`.
    """

    def __init__(self, asker: Asker, *, chat: bool) -> None:
        super().__init__()
        self._asker = asker
        self._chat = chat

    @property
    def tokenizer_name(self) -> str:
        """Chats stay messages here."""
        return "messages"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages themselves: our engine renders them."""
        if not add_generation_prompt:
            raise UserError("the task begins the model's answer for it, which our engines do not do.")
        return json.dumps(chat_history)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies; a request that stands several times is drawn as often."""
        del disable_tqdm
        wanted, draws = [], dict[tuple[Document, int], int]()
        for request in requests:
            context, settings = request.args
            key = (_document(request), request.idx)
            draws[key] = draws.get(key, -1) + 1
            messages = tuple(
                Message(turn["role"], (TextPart(turn["content"]),)) for turn in json.loads(context)
            )
            wanted.append(Generation(key[0], key[1], draws[key], messages, settings))
        return self._asker.generate(wanted)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """By that harness's own class around our model."""
        del disable_tqdm
        if self._chat:
            raise UserError("the task asks for log-likelihoods beside replies, which is not built.")
        found = self._asker.likelihoods(
            [_document(request) for request in requests],
            [tuple(request.args) for request in requests],
            lambda places: self._theirs.loglikelihood(
                [requests[place] for place in places], disable_tqdm=True
            ),
        )
        return [(value, bool(greedy)) for value, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts."""
        del disable_tqdm

        def compute(places: Sequence[int]) -> list[tuple[float, bool | None]]:
            texts = [requests[place] for place in places]
            return [(value, None) for value in self._theirs.loglikelihood_rolling(texts, disable_tqdm=True)]

        documents = [_document(request) for request in requests]
        return [value for value, _ in self._asker.likelihoods(documents, [r.args for r in requests], compute)]

    @cached_property
    def _theirs(self) -> Any:
        opened = self._asker.opened
        if opened.local is None:
            raise UserError(
                f"the task asks for log-likelihoods of given answers, which {opened.name} does not tell. "
                "Take a local model, or a task that the model answers in words."
            )
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            opened.local.adapter.save_pretrained(Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
        row = min(opened.context or LIKELIHOOD_TOKENS, LIKELIHOOD_TOKENS)
        rows = max(1, self._asker.batch_tokens // row)
        return HFLM(pretrained=opened.local.model, tokenizer=tokenizer, batch_size=rows)


def _document(request: Any) -> Document:
    return request.task_name, int(request.doc_id)
