"""How good do answers seem to another model, and how far can that model be believed?

Any Engine can judge. Pairs are shown in both orders; a verdict that does not follow the rules is asked for
again and, if it never does, counted in the middle of the scale with the bounds that this leaves open. Every
reply is stored, so a killed run goes on where it was and a finished one costs nothing to read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from eval.judge_opinions import Cost, Opinion, PairOpinion, RatingOpinion, total_cost
from eval.judge_prompts import (
    Item,
    Verdict,
    judge_sample,
    pairwise_prompt,
    parse_rating,
    parse_verdict,
    single_prompt,
)
from shared.config_section import Section
from shared.errors import UserError
from shared.generation.collect import Progress, collect_responses
from shared.generation.engine import Engine
from shared.generation.rendering import estimated_tokens
from shared.types import Request, Response, Sample, Sampling

CONSTANT_ANSWER = (
    "Thank you for your question. There are several points to consider here, and the best answer depends on "
    "your circumstances. I hope this helps!"
)

V = TypeVar("V")


class JudgeSettings(Section):
    """How a judge is asked. Retries have a temperature of their own: a greedy judge would repeat itself."""

    max_new_tokens: int = Field(2048, ge=1, description="a reply that is cut has no verdict")
    temperature: float = Field(0.0, ge=0.0, description="of the first draw; 0 is greedy")
    draws: int = Field(3, ge=1, description="the first, and retries where a verdict cannot be read")
    retry_temperature: float = Field(0.7, gt=0.0)
    seed: int = Field(0, ge=0)
    batch_tokens: int = Field(65536, ge=1, description="prompt and reply tokens between two commits")
    show_images: bool = Field(True, description="false: judge by text and reference alone")

    def sampling(self, draw: int) -> Sampling:
        """How the first reply, or a retry, is drawn."""
        temperature = self.temperature if draw == 0 else self.retry_temperature
        return Sampling(self.max_new_tokens, temperature=temperature, top_p=1.0, seed=self.seed)


def judge_pairs(
    engine: Engine,
    items: Sequence[Item],
    settings: JudgeSettings,
    *,
    folder: Path,
    prompt_tokens: Callable[[Sample], int] = estimated_tokens,
    progress: Callable[[Progress], None] | None = None,
) -> list[PairOpinion]:
    """Compare each answer with its baseline, in both orders.

    Args:
        engine: The judge.
        items: Each with a baseline and an id of its own.
        settings: How it is asked.
        folder: Of the judge's replies to exactly these items; made or resumed.
        prompt_tokens: Length of a prompt in the judge's own tokens, where it is known; plans batches.
        progress: Called after each batch of each draw.

    Raises:
        StoreError: the folder holds replies to other items, or of another judge.
        UserError: images that the judge cannot see, or what the engine raises.
    """
    samples = []
    for item in items:
        assert item.baseline is not None, f"{item.sample_id!r} has no baseline to compare with"
        orders = {"first": (item.answer, item.baseline), "second": (item.baseline, item.answer)}
        for order, answers in orders.items():
            prompt = pairwise_prompt(item.question, *answers, reference=item.reference)
            samples.append(judge_sample(f"{item.sample_id}/{order}", prompt, _seen(engine, item, settings)))
    opinions: list[Opinion[Verdict]] = _ask(
        engine, samples, parse_verdict, settings, folder, prompt_tokens, progress
    )
    return [
        PairOpinion(item.sample_id, first, second, total_cost([first.cost, second.cost]))
        for item, first, second in zip(items, opinions[::2], opinions[1::2], strict=True)
    ]


def judge_answers(
    engine: Engine,
    items: Sequence[Item],
    settings: JudgeSettings,
    *,
    folder: Path,
    prompt_tokens: Callable[[Sample], int] = estimated_tokens,
    progress: Callable[[Progress], None] | None = None,
) -> list[RatingOpinion]:
    """Grade each answer by itself, from 1 to 10; as `judge_pairs`, but for the baseline."""
    samples = [
        judge_sample(
            item.sample_id,
            single_prompt(item.question, item.answer, item.reference),
            _seen(engine, item, settings),
        )
        for item in items
    ]
    opinions = _ask(engine, samples, parse_rating, settings, folder, prompt_tokens, progress)
    return [RatingOpinion(item.sample_id, o) for item, o in zip(items, opinions, strict=True)]


def controls(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Answers of which one knows what a judge worth its name must say: to be judged as the real ones are.

    `constant`: the same empty words for every request. `reference`: the reference answers themselves, not
    shown as references, for the items that have one.
    """
    referenced = [item for item in items if item.reference is not None]
    return {
        "constant": [item._replace(answer=CONSTANT_ANSWER) for item in items],
        "reference": [item._replace(answer=item.reference or "", reference=None) for item in referenced],
    }


def _ask(
    engine: Engine,
    samples: Sequence[Sample],
    parse: Callable[[Response], V | None],
    settings: JudgeSettings,
    folder: Path,
    prompt_tokens: Callable[[Sample], int],
    progress: Callable[[Progress], None] | None,
) -> list[Opinion[V]]:
    """One store for each draw. Which samples a later draw asks again follows from the stores before it."""
    verdicts: list[V | None] = [None] * len(samples)
    replies: list[list[Response]] = [[] for _ in samples]
    for draw in range(settings.draws):
        unread = [index for index, verdict in enumerate(verdicts) if verdict is None]
        if not unread:
            break
        responses = collect_responses(
            engine,
            [Request(samples[index], "judge", 0, draw) for index in unread],
            settings.sampling(draw),
            folder=folder / f"draw-{draw}",
            prompt_tokens=prompt_tokens,
            batch_tokens=settings.batch_tokens,
            progress=progress,
        )
        for index, response in zip(unread, responses, strict=True):
            replies[index].append(response)
            verdicts[index] = parse(response)
    own_ids = engine.returns_token_ids
    return [
        Opinion(verdict, said[-1].text, total_cost(_cost(response, own_ids) for response in said))
        for verdict, said in zip(verdicts, replies, strict=True)
    ]


def _cost(response: Response, own_ids: bool) -> Cost:
    usage = response.usage
    if usage is None:
        return Cost(1, None, len(response.token_ids) if own_ids else None, None)
    return Cost(1, usage.prompt_tokens, usage.response_tokens, usage.seconds)


def _seen(engine: Engine, item: Item, settings: JudgeSettings) -> tuple[str, ...]:
    if not settings.show_images:
        return ()
    if item.images and not engine.accepts_images:
        raise UserError(
            f"{item.sample_id!r} is about images, and the judge sees none. Choose a judge that accepts "
            "images, or set show_images: false to have it judge by text and reference alone."
        )
    return item.images
