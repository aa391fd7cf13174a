"""How does a judge's opinion become values of a task's records?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.judge import JudgeSettings, controls, judge_answers, judge_pairs
from eval.judge_opinions import Summary, doubts, summarise_pairs, summarise_ratings
from eval.judge_prompts import Item, question_text
from eval.models import open_model
from eval.scoring import Judged, Judging
from eval.settings import JudgeChoice
from eval.task import Reply
from shared.errors import UserError
from shared.models.loading import check_model_folder
from shared.models.references import SERVER_SCHEME, ModelRef, parse_server
from shared.progress import Speaker


def check_judge(choice: JudgeChoice) -> None:
    """Refuse a judge that can be seen not to be there, before anything is asked.

    Raises:
        UserError: a folder without a model, a server that is not written as one.
    """
    if choice.model.startswith(SERVER_SCHEME):
        parse_server(choice.model)
    else:
        check_model_folder(ModelRef(name=choice.model))


def make_judging(choice: JudgeChoice | None, speaker: Speaker) -> Judging | None:
    """Grading as asked for; the judge is opened when there is something to grade."""
    if choice is None:
        return None

    def judge(replies: Sequence[Reply], folder: Path) -> Judged:
        turns = [_items(reply, choice) for reply in replies]  # of each reply, an item a turn that is judged
        items = [item for asked in turns for item in asked]
        opened = open_model(choice.model, {})
        settings = JudgeSettings(
            max_new_tokens=choice.max_new_tokens,
            temperature=choice.temperature,
            draws=choice.draws,
            seed=choice.seed,
        )
        run: Any = judge_pairs if choice.mode == "pairwise" else judge_answers

        def opinions(asked: Sequence[Item], name: str) -> Any:
            with speaker.bar(f"judging {name}") as bar:
                return run(
                    opened.engine,
                    asked,
                    settings,
                    folder=folder / name,
                    prompt_tokens=opened.prompt_tokens,
                    progress=lambda p: bar(p.batches_done, p.batches_total),
                )

        found = opinions(items, "replies")
        summary = _summarise(choice, items, found)
        values = iter([_value(choice, opinion) for opinion in found])
        checks = {
            name: _summarise(choice, asked, opinions(asked, name))
            for name, asked in _controls(choice, items).items()
            if asked
        }
        return Judged(
            [_of_reply(choice, [next(values) for _ in asked]) for asked in turns],
            {
                **asdict(summary),
                "controls": {name: asdict(check) for name, check in checks.items()},
                "doubts": doubts(summary, checks),
            },
        )

    return judge


def _items(reply: Reply, choice: JudgeChoice) -> list[Item]:
    """Every turn with the conversation before it, the model's own replies included.

    Compared with the reference, a turn that has none is left out.
    """
    question, pairwise = reply.question, choice.mode == "pairwise"
    last = question.references[0] if question.references else None
    references = question.data.get("references") or [*[None] * (question.turns - 1), last]
    items = []
    for turn, answer in enumerate(reply.texts):
        reference = references[turn] if turn < len(references) else None
        if pairwise and not reference:
            continue
        sample = question.sample("instruction", reply.texts[:turn])
        name = f"{question.id}#{reply.draw}" + (f"/turn-{turn + 1}" if question.turns > 1 else "")
        # what the reply is compared with is no hint for the judge
        hint, baseline = (None, reference) if pairwise else (reference or None, None)
        items.append(Item(name, question_text(sample), answer, baseline, hint, sample.images))
    if not items:
        raise UserError(
            f"the judge is to compare with the reference, and {question.id!r} has none. Set judge.mode=single"
            " to have each reply graded by itself."
        )
    return items


def _controls(choice: JudgeChoice, items: Sequence[Item]) -> dict[str, list[Item]]:
    if choice.mode == "single":
        return controls(items)
    # the baseline is the reference, so this control pits it against itself: what is left is the judge's noise
    made = controls([item._replace(reference=item.baseline) for item in items])
    return {name: [item._replace(reference=None) for item in asked] for name, asked in made.items()}


def _summarise(choice: JudgeChoice, items: Sequence[Item], opinions: Any) -> Summary:
    questions = [item.sample_id.rpartition("#")[0] for item in items]
    if choice.mode == "pairwise":
        return summarise_pairs(items, opinions, clusters=questions)
    return summarise_ratings(opinions, clusters=questions)


def _value(choice: JudgeChoice, opinion: Any) -> float:
    return float(opinion.preference if choice.mode == "pairwise" else opinion.rating)


def _of_reply(choice: JudgeChoice, turns: Sequence[float]) -> Mapping[str, float]:
    """The mean over turns, and each by itself where there are several."""
    name = "win_rate" if choice.mode == "pairwise" else "rating"
    each = {f"{name}_turn_{turn}": value for turn, value in enumerate(turns, start=1)}
    return {name: sum(turns) / len(turns), **(each if len(turns) > 1 else {})}
