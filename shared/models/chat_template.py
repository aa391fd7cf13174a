"""What must hold of a model's chat template, whichever modality renders with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import jinja2

from shared.errors import AlignmentError, UserError
from shared.models.vocabulary import Vocabulary
from shared.types import Message, Sample, TextPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEMPLATE_INPUTS = frozenset({"tools", "documents"})  # of a chat, as opposed to settings of the rendering


def refuse_idle_arguments(
    arguments: Iterable[str], template: str, reserved: Collection[str], model: str
) -> None:
    """Refuse template arguments that the template does not read, or that are not for a run to set.

    Args:
        arguments: names from the configuration.
        template: the Jinja source.
        reserved: parameters of the function that renders.
        model: for the message.

    Raises:
        UserError: names them.
    """
    own = set(reserved) - TEMPLATE_INPUTS
    idle = [name for name in arguments if name in own or not re.search(rf"\b{re.escape(name)}\b", template)]
    if idle:
        raise UserError(
            f"template_arguments {', '.join(map(repr, idle))}: not read by the chat template of "
            f"{model!r}, or not for a run to set. Remove them, or correct their spelling."
        )


def render_chat(sample: Sample, render: Callable[[], str]) -> str:
    """What `render` gives, or an error that names the sample.

    Raises:
        UserError: the template refuses the chat.
    """
    try:
        return render()
    except (jinja2.TemplateError, TypeError) as error:  # the second: what a template's own code runs into
        raise UserError(
            f"sample {sample.id!r} ({sample.source}): the model's chat template refuses it: {error}. "
            "Change the chat, or give the model another `chat_template`."
        ) from None


def warn_of_dates(template: str, arguments: Collection[str], model: str) -> None:
    """Warn where a template asks for the day: a run that goes on tomorrow would read other prompts.

    Args:
        template: the Jinja source.
        arguments: names that the configuration gives; Llama 3's `date_string` takes the place of the day.
        model: for the message.
    """
    if "strftime_now" in template and "date_string" not in arguments:
        logger.warning(
            "the chat template of %r writes today's date into prompts: a run that is resumed or compared on "
            "another day reads other prompts. Fix it by template_arguments (of Llama 3: date_string).",
            model,
        )


def with_system_prompt(messages: tuple[Message, ...], system_prompt: str | None) -> tuple[Message, ...]:
    """The chat with a system turn in front, if there is one to add and none yet."""
    if system_prompt is None or messages[0].role == "system":
        return messages
    return (Message("system", (TextPart(system_prompt),)), *messages)


def turn_end_id(tokenizer: PreTrainedTokenizerBase, render: Callable[[Sequence[Message]], str]) -> int | None:
    """The first special token that the template writes after an assistant's words, where there is one.

    Base models often keep their end-of-text token as `eos_token` while the template ends turns with another.
    """
    marker = "turn"
    chat = [Message("user", (TextPart("hello"),)), Message("assistant", (TextPart(marker),))]
    try:
        rendered = render(chat)
    except (jinja2.TemplateError, TypeError):
        return None  # a template that refuses this little chat may still take real ones
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    after = tokenizer(rendered.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
    return next((index for index in after if index in special), None)


def check_response(sample: Sample, token_ids: Sequence[int], vocabulary: Vocabulary, model: str) -> None:
    """A response must have tokens, and only ones that the model's tokenizer has.

    Raises:
        AlignmentError: naming the sample.
    """
    if not token_ids:
        raise AlignmentError(f"sample {sample.id!r}: a response has no tokens, so no row predicts it.")
    foreign = [index for index in token_ids if vocabulary.token(index) is None]
    if foreign:
        raise AlignmentError(
            f"sample {sample.id!r}: a response holds token id {foreign[0]}, and the tokenizer of "
            f"{model!r} has no such token ({vocabulary.size} ids). "
            "Teacher and student need the same tokenizer."
        )


def chat_of(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as a text model's template takes them."""
    return [{"role": message.role, "content": message.text} for message in messages]
