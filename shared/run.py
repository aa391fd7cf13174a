"""A run from prompts to report: each arrow of a sample's life is one call here, top to bottom.

Killed anywhere and started again, a run goes on where it was: responses are stores, the student is a
checkpoint, and everything else is a pure function of configuration and data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import transformers

from shared.adapter import Adapter, AdapterKind
from shared.config import RunConfig
from shared.config_data import OfflineConfig
from shared.config_models import CacheConfig
from shared.data.offline import offline_responses
from shared.data.pairs import make_groups, pair_facts
from shared.export import export_student, write_model_card
from shared.generation.engine import Engine
from shared.models.teachers import fingerprint_of_model
from shared.objectives.objective import build_objective
from shared.progress import Speaker
from shared.report.curves import training_curves
from shared.report.formats import percent
from shared.report.html import write_report
from shared.report.sections import KeyValues, Report, Section
from shared.session import Session, open_session
from shared.teacher_memory import bring_teacher_back, cache_facts, cache_teacher
from shared.training.checkpoints import find_checkpoints, load_optimizer, load_weights, save_checkpoint
from shared.training.loop import heldout_nats, step_seed, train_round
from shared.training.memory import return_freed_memory
from shared.training.setup import open_accelerator
from shared.types import Group, Request, Response, Role, Sample, Sampling
from shared.workspace import HELDOUT, Workspace

Stage = Literal["generate", "train", "export", "report"]
SHOWN_ANSWER_TOKENS = 64
PAIRS = "pairs.json"  # of a round: what `pair_facts` says
# what a held-out measurement is called, and its title; what a cache keeps of the KL is less than all of it
HELDOUT_METRICS = {
    "teacher": ("heldout/kl", "held-out KL(teacher ‖ student)"),
    "cache": ("heldout/kl_cached", "held-out KL(teacher ‖ student), as far as the cache shows it"),
    "reference": ("heldout/nll", "held-out −log q(reference answer)"),
}


class Outcome(NamedTuple):
    """What an evaluation adds to the report and the model card."""

    data: Mapping[str, Any]  # scores, retention and gap_closed of report.json
    sections: Sequence[Section]
    figures: Sequence[tuple[str, str]]  # name and value, for terminal and model card


Evaluate = Callable[["Run"], Outcome]


class Run:
    """One run in its folder."""

    session: Session
    heldout_groups: Sequence[Group]  # held-out prompts, with the teacher's sampled responses if there is one
    _cached_groups: Sequence[Group] | None = None  # every round's pairs, where the teacher is cached

    def __init__(
        self,
        config: RunConfig,
        kind: AdapterKind,
        *,
        evaluate: Evaluate,
        speaker: Speaker,
        shares: bool = False,  # it is one of a sweep, and takes over what the others have made
    ) -> None:
        self.config = config
        self.kind = kind
        self._evaluate = evaluate
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # our own say what is going on
        self._objective = build_objective(config.objective.name, config.objective.parameters)
        self._accelerator = open_accelerator(config.training, str(config.folder), config.name)
        main = self._accelerator.is_main_process
        self.speaker = speaker if main else Speaker(quiet=True)
        self.workspace = Workspace(config.folder, main=main, shares=shares)
        self._done_rounds = 0
        self._done_legs = 0  # of the round at hand; it has one, or as many as generation.refresh makes
        self._first_step = 0  # of the leg at hand
        self._sampled_from = ""  # fingerprint of the student that this leg's responses come from

    def execute(self, until: Stage = "report") -> None:
        """Go through the stages that are not done yet.

        Args:
            until: stop after this stage; "generate" and "train" do one round.

        Raises:
            UserError: whatever the user can mend; nothing that was committed is lost.
        """
        self.workspace.open(self.config)
        try:
            self.session = open_session(
                self.config,
                self.kind,
                self._objective,
                workspace=self.workspace,
                speaker=self.speaker,
                accelerator=self._accelerator,
            )
            additions = self.session.trainee.additions = self.kind.additions(self.session)
            self.heldout_groups = self._heldout()
            if self.config.teacher is not None and self.config.teacher.cache is not None:
                self._cache_teacher(self.config.teacher.cache)
            self._start_or_resume()
            while self._done_rounds < self.config.training.rounds:
                groups = self._cached_groups or self._sample(self._done_rounds + 1)
                additions.settle()
                if until == "generate":
                    return
                self._train(self._done_rounds + 1, groups)
                additions.settle()
                if until == "train" and self._done_legs == 0:
                    return
            self._export()
            if until == "report":
                self._report()
                additions.settle()
        finally:
            self.workspace.close()

    def close(self) -> None:
        """Finish the trackers, after waiting for the process that reports: a launcher ends all together."""
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()

    # --- the student before its first step, or where it was ------------------------------------------------

    def _start_or_resume(self) -> None:
        trainee = self.session.trainee
        checkpoints = find_checkpoints(self.workspace.folder)
        if checkpoints:
            latest = checkpoints[-1]
            state = latest.state
            load_weights(latest, trainee.student)
            load_optimizer(latest, trainee.student, trainee.optimizer)
            trainee.restore(latest.step, state)
            self._done_rounds = state["done_rounds"]
            self._done_legs = state["done_legs"]
            self._first_step = state["first_step"]
            self._sampled_from = state["sampled_from"]
            self.workspace.cut_metrics(latest.step)
            if self._done_rounds < self.config.training.rounds:
                self.speaker.say(f"  resuming at step {latest.step} of {trainee.total_steps}")
            return
        self.workspace.cut_metrics(None)
        self._sampled_from = fingerprint_of_model(trainee.student)
        self._measure(round_number=0)
        self._show_answers(round_number=0)
        self._save(round_number=1)

    def _heldout(self) -> Sequence[Group]:
        session = self.session
        role: Role = "reference"
        if session.models.teacher is None:
            responses: Sequence[Response] = _references(session.heldout_samples, session)
        else:
            role = "teacher"
            with self.workspace.timed("generate"):
                responses = session.collect(
                    session.teacher_engine(),
                    role,
                    session.heldout_samples,
                    self.workspace.folder / HELDOUT,
                    sampling=session.sampling(),
                    what="teacher's held-out responses",
                )
        return make_groups(session.heldout_samples, {role: responses}, (role,), truncated="keep").groups

    def _cache_teacher(self, cache: CacheConfig) -> None:
        """All that training needs of the teacher, to the disk; from here on it is out of memory."""
        self._cached_groups = self._sample(1)
        _ = self._teachers_example
        with self.workspace.timed("cache"):
            cache_teacher(self.session, cache, self._cached_groups, self.heldout_groups)

    # --- a round: sample, then train ------------------------------------------------------------------------

    def _sample(self, number: int) -> Sequence[Group]:
        session, roles, generation = self.session, self._objective.sides, self.config.generation
        if roles != ("reference",):  # nobody samples what the data set itself answers
            self.speaker.stage(f"{self._title(number)}: sampling")
        legs = session.legs(number)
        samples = legs[self._done_legs]
        responses: dict[Role, Sequence[Response]] = {}
        trainee, checkpoints = session.trainee, find_checkpoints(self.workspace.folder)
        moved_on = trainee.step > self._first_step
        if moved_on:  # resumed in training: a damaged response is the leg's first student's to make again
            load_weights(next(c for c in checkpoints if c.step == self._first_step), trainee.student)
        with self.workspace.timed("generate"):
            for role in roles:
                if role == "reference":
                    responses[role] = _references(session.train_samples, session)
                    continue
                teacher = role == "teacher"
                offline = generation.offline.teacher if teacher else generation.offline.student
                if offline is not None:
                    found = offline_responses(
                        session.train_samples, role, offline, session.models.student_adapter
                    )
                    responses[role] = found.responses
                    self.speaker.say(f"  {role}'s responses: {found.summary(offline)}")
                    continue
                made_in = 1 if teacher and generation.reuse_teacher else number
                part = role if teacher or len(legs) == 1 else f"{role}-{self._done_legs + 1:03d}"
                responses[role] = session.collect(
                    session.teacher_engine() if teacher else session.student_engine(self._sampled_from),
                    role,
                    session.train_samples if teacher else samples,
                    self.workspace.round_folder(made_in) / "responses" / part,
                    sampling=session.sampling(),
                    round_number=made_in,
                    draws=generation.draws,
                )
        if moved_on:
            load_weights(checkpoints[-1], trainee.student)
        grouping = make_groups(
            samples,
            responses,
            roles,
            truncated=generation.truncated,
            filters=generation.filters,
            longest=generation.max_new_tokens if generation.offline != OfflineConfig() else None,
        )
        grouping = session.trainee.additions.screen(grouping)
        if grouping.dropped:
            self.speaker.say(f"  {grouping.summary()}")
        if roles != ("reference",):
            facts = pair_facts(grouping.groups)
            self.workspace.write_json(f"round-{number:02d}/{PAIRS}", facts)
            if facts["same"]:
                self.speaker.say(f"  both answer the same in {percent(facts['same'])} of the pairs")
        return grouping.groups

    def _train(self, number: int, groups: Sequence[Group]) -> None:
        trainee = self.session.trainee
        steps = -(-len(groups) // self.config.training.pairs_per_step)
        self.speaker.stage(f"{self._title(number)}: training, {steps} steps")
        with self.workspace.timed("train"), self.speaker.bar("training") as bar:

            def on_step(metrics: dict[str, float]) -> None:
                self.workspace.log_metrics({"step": trainee.step, "round": number, **metrics})
                self._accelerator.log(metrics, step=trainee.step)
                speed = f"{metrics['train/tokens_per_second']:.0f} tokens/s"
                bar(trainee.step - self._first_step, steps, f"loss {metrics['train/loss']:.3f}, {speed}")

            train_round(
                trainee,
                groups,
                first_step=self._first_step,
                seed=step_seed(self.config.seed, number, *([self._done_legs] if self._done_legs else [])),
                on_step=on_step,
                on_checkpoint=lambda: self._save(number),
                on_evaluate=lambda: self._measure(number),
            )
        self._done_legs += 1
        if self._done_legs == len(self.session.legs(number)):
            trainee.alpha.end_round()
            self._measure(number)
            self._show_answers(number)
            self._done_rounds, self._done_legs = number, 0
        self._first_step = trainee.step
        self._sampled_from = fingerprint_of_model(trainee.student)
        self._save(number)

    def _title(self, number: int) -> str:
        legs = len(self.session.legs(number))
        part = f", part {self._done_legs + 1} of {legs}" if legs > 1 else ""
        return f"Round {number} of {self.config.training.rounds}{part}"

    def _measure(self, round_number: int) -> None:
        """How far the student is on held-out prompts into the log; the best student so far is kept."""
        trainee = self.session.trainee
        measured_by = "reference" if trainee.teacher is None else "teacher"
        metric, title = HELDOUT_METRICS["cache" if self._cached_groups else measured_by]
        with self.workspace.timed("evaluate"):
            nats = heldout_nats(trainee, self.heldout_groups)
        self.workspace.log_metrics({"step": trainee.step, "round": round_number, metric: nats})
        self._accelerator.log({metric: nats}, step=trainee.step)
        best = trainee.best_nats
        before = f", from {best:.3f}" if best < float("inf") else ""
        self.speaker.say(f"  {title}: {nats:.3f} nats per token{before}")
        if nats < best:
            trainee.best_nats = nats
            self._save(max(round_number, 1), kind="best")

    def _show_answers(self, round_number: int) -> None:
        """One held-out prompt with both answers, so that a person sees what a figure means."""
        session = self.session
        with self.workspace.timed("evaluate"):
            answers = {"teacher": self._teachers_example} if self.config.teacher is not None else {}
            answers["student"] = self._example(session.student_engine("shown"))
        prompt = session.heldout_samples[0].messages[-1].text
        row = {"step": session.trainee.step, "round": round_number, "example": {"prompt": prompt, **answers}}
        self.workspace.log_metrics(row)
        self.speaker.answers(prompt, answers)

    @cached_property
    def _teachers_example(self) -> str:
        """Always the same, and asked for when a cached teacher is out of memory."""
        return self._example(self.session.teacher_engine())

    def _example(self, engine: Engine) -> str:
        """A short greedy answer to the first held-out prompt."""
        limit = min(SHOWN_ANSWER_TOKENS, self.config.generation.max_new_tokens)
        request = Request(self.session.heldout_samples[0], "student", 0)
        (response,) = engine.generate([request], Sampling(max_new_tokens=limit, temperature=0.0))
        return response.text

    def _save(self, round_number: int, kind: Literal["step", "best"] = "step") -> None:
        trainee = self.session.trainee
        if self._accelerator.is_main_process:
            save_checkpoint(
                self.workspace.folder,
                round_number=round_number,
                step=trainee.step,
                student=trainee.student,
                optimizer=trainee.optimizer if kind == "step" and trainee.step else None,
                state={
                    **trainee.state(),
                    "done_rounds": self._done_rounds,
                    "done_legs": self._done_legs,
                    "first_step": self._first_step,
                    "sampled_from": self._sampled_from,
                },
                kind=kind,
                # the start is evaluated; a round's start samples again what is found damaged
                keep=(0, self._first_step) if kind == "step" else (),
            )
        self._accelerator.wait_for_everyone()

    # --- what comes out ------------------------------------------------------------------------------------

    def _export(self) -> None:
        trainee, folder = self.session.trainee, self.workspace.folder
        if (folder / "student").exists() or not self._accelerator.is_main_process:
            return
        if self.config.export.checkpoint == "best":
            load_weights(find_checkpoints(folder, "best")[-1], trainee.student)
        trainee.optimizer.state.clear()  # the last checkpoint has the moments; what follows needs the memory
        trainee.optimizer.zero_grad(set_to_none=True)
        return_freed_memory()
        with self.workspace.timed("export"):
            export_student(trainee.student, self.session.models, self.config, folder)
        self.speaker.stage(f"Exported {folder / 'student'}")

    def _report(self) -> None:
        if not self._accelerator.is_main_process:
            return
        if self._cached_groups:
            with self.workspace.timed("load"):
                bring_teacher_back(self.session, self.kind)
        self.speaker.stage("Evaluating teacher, start and student")
        with self.workspace.timed("evaluate"):
            outcome = self._evaluate(self)
        config, usage, folder = self.config, self.workspace.usage(), self.workspace.folder
        rounds = range(1, config.training.rounds + 1)
        data = {
            "run": {"name": config.name, "objective": config.objective.name, "seed": config.seed},
            **outcome.data,
            "pairs": [self.workspace.read_json(f"round-{n:02d}/{PAIRS}") for n in rounds],
            **usage,
        }
        environment = self.workspace.read_json("environment.json") or {}
        facts = {
            **({"teacher": config.teacher.model.name} if config.teacher is not None else {}),
            "student": f"{config.student.model.name}, {config.student.how}",
            "machine": f"{environment.get('processor')}, {environment.get('cores')} cores",
            **cache_facts(self.workspace),
            "peak memory": f"{usage['peak_memory_bytes'] / 2**30:.1f} GiB",
            **{f"time, {stage}": f"{seconds:.0f} s" for stage, seconds in usage["timing_s"].items()},
        }
        report = Report(
            title=config.name,
            subtitle=f"{config.objective.name}, {config.training.rounds} rounds, seed {config.seed}",
            sections=(
                *outcome.sections,
                training_curves(self.workspace.metrics()),
                KeyValues("The run", facts),
            ),
        )
        write_report(folder, report, data)
        write_model_card(folder / "student", config, outcome.figures, facts)
        for name, value in outcome.figures:
            self.speaker.say(f"  {name}: {value}")
        self.speaker.stage(f"Report: {folder / 'report.html'}")


def _references(samples: Sequence[Sample], session: Session) -> list[Response]:
    """The data set's own answers, tokenised once by the student's adapter."""
    adapter = session.models.student_adapter
    return [_reference(sample, adapter) for sample in samples]


def _reference(sample: Sample, adapter: Adapter) -> Response:
    text = sample.reference or ""
    return Response(
        sample_id=sample.id,
        role="reference",
        round=0,
        draw=0,
        token_ids=adapter.encode_text(text, stop=True),
        text=text,
        finish_reason="stop",
        fingerprint=adapter.fingerprint,
    )
