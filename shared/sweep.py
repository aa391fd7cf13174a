"""How are objectives compared? The same run with several settings, learning rates and seeds.

Each setting is run at every learning rate with the first seed; the rate that the first metric likes best is
then run with the other seeds. So every setting has the same number of tries, and none is judged by the seed
that it was tuned on alone. Each run has a folder, and takes from the runs beside it what does not depend on
what differs: the responses of the teacher, and of a student before its first step.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import Field, field_validator, model_validator

from shared.config import RunConfig
from shared.config_files import load_values, parse_values, set_value
from shared.config_section import Section
from shared.errors import ConfigError, NonFiniteLossError, UserError, unknown_name
from shared.progress import Speaker
from shared.recipe import NAME, RUN_FINISHED, RUN_PRODUCT, is_recipe
from shared.workspace import Workspace

Config = TypeVar("Config", bound=RunConfig)
SettingName = Annotated[str, Field(pattern=NAME)]
Rate = Annotated[float, Field(gt=0)]
GIVEN = ("name", "output", "seed", "training.learning_rate")
"""What the sweep itself gives each run."""


class SweepConfig(Section):
    """One run, and what of it is varied."""

    name: str = Field(pattern=NAME)
    output: str | None = Field(None, description="folder of all runs; default sweeps/NAME")
    run: dict[str, Any] = Field(description="a run's configuration, or the path of one")
    settings: dict[SettingName, dict[str, Any]] = Field(
        min_length=1, description="what is compared: key.sub: value, in place of the run's own"
    )
    learning_rates: tuple[Rate, ...] = Field(min_length=1, description="each is tried with the first seed")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="the first chooses the learning rate"
    )
    metrics: tuple[str, ...] = Field(
        min_length=1, description="of report.json; the first chooses the learning rate"
    )
    shown: tuple[str, ...] = Field((), description="metrics that are shown and decide nothing")
    keep_models: bool = Field(False, description="checkpoints and exports of finished runs")

    @field_validator("learning_rates", "seeds", "metrics")
    @classmethod
    def _all_different(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"each only once; got {', '.join(map(str, values))}")
        return values

    @model_validator(mode="after")
    def _axes_are_the_sweeps(self) -> SweepConfig:
        for name, changes in self.settings.items():
            taken = [key for key in GIVEN if key in changes]
            if taken:
                raise ValueError(
                    f"settings.{name}: {', '.join(taken)} cannot be a setting's own: the sweep gives name, "
                    "folder, seed and learning rate. Remove it; learning_rates and seeds are axes."
                )
        return self


class Combination(NamedTuple):
    """What sets one run of a sweep apart."""

    setting: str
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        """The name of its folder."""
        return f"{self.setting}-lr{self.learning_rate:g}-seed{self.seed}"


class Sweep(NamedTuple, Generic[Config]):
    """A sweep that was read, with the checked configuration of every run that it may come to."""

    config: SweepConfig
    folder: Path
    configs: Mapping[Combination, Config]

    @property
    def total(self) -> int:
        """How many runs it takes."""
        settings, rates, seeds = (
            len(axis) for axis in (self.config.settings, self.config.learning_rates, self.config.seeds)
        )
        return settings * (rates + seeds - 1)

    def only(self, names: Sequence[str]) -> Sweep[Config]:
        """The same folder and runs, of some settings.

        Raises:
            UserError: no setting of that name.
        """
        for name in names:
            if name not in self.config.settings:
                raise UserError(unknown_name("setting", name, self.config.settings))
        settings = {name: changes for name, changes in self.config.settings.items() if name in names}
        return self._replace(
            config=self.config.model_copy(update={"settings": settings}),
            configs={of: run for of, run in self.configs.items() if of.setting in names},
        )

    def one_each(self) -> list[Config]:
        """The first run of every setting."""
        first: dict[str, Config] = {}
        for of, run in self.configs.items():
            first.setdefault(of.setting, run)
        return list(first.values())

    def facts(self) -> dict[str, object]:
        """What it will be, for a check."""
        config = self.config
        return {
            "sweep": config.name,
            "folder": str(self.folder),
            "settings": ", ".join(config.settings),
            "learning rates": ", ".join(f"{rate:g}" for rate in config.learning_rates),
            "seeds": ", ".join(map(str, config.seeds)),
            "runs": self.total,
        }


class Result(NamedTuple):
    """A finished run; `report` is its report.json, None where the loss was not finite."""

    combination: Combination
    report: Mapping[str, Any] | None

    def score(self, metric: str, role: str = "student") -> float | None:
        """A model's score; None where it has none."""
        scores = (self.report or {}).get("scores", {}).get(role, {})
        value: float | None = scores.get(metric, {}).get("value")
        return value


def is_sweep(values: object) -> bool:
    """Whether a configuration file holds settings to compare."""
    return isinstance(values, dict) and "settings" in values


def include_run(values: dict[str, Any], path: Path) -> None:
    """Put the run's configuration where `run` names a file, relative to the sweep's own.

    Raises:
        ConfigError: no such file, a recipe or another sweep.
    """
    run = values.get("run")
    if isinstance(run, str):
        run = load_values(path.parent / run)
        if is_recipe(run) or is_sweep(run):
            raise ConfigError(
                f"{path}: run: {values['run']} holds no single run. Name a run's configuration."
            )
        for key in GIVEN:
            *sections, last = key.split(".")
            node: Any = run
            for section in sections:
                node = node.get(section) or {}
            node.pop(last, None)
        values["run"] = run


def open_sweep(
    values: dict[str, Any],
    config_class: type[Config],
    source: str,
    *,
    smoke: Callable[[Any], Any] | None = None,
) -> Sweep[Config]:
    """Check a sweep and every run that it may come to.

    Args:
        values: what its file holds, `include_run` done.
        config_class: of the runs.
        source: for messages.
        smoke: makes a small run; then one learning rate and one seed do.

    Raises:
        ConfigError: unknown keys, wrong types, a setting that cannot take effect; names the setting.
    """
    sweep = parse_values(values, SweepConfig, source)
    taken = [key for key in GIVEN if _has(sweep.run, key)]
    if taken:
        raise ConfigError(
            f"{source}: no effect of run.{', run.'.join(taken)}: the sweep gives each run its own. Remove it."
        )
    folder = Path(sweep.output or f"sweeps/{sweep.name}")
    if smoke is not None:
        folder = folder.with_name(f"{folder.name}-smoke")
        sweep = sweep.model_copy(
            update={"learning_rates": sweep.learning_rates[:1], "seeds": sweep.seeds[:1]}
        )
    configs = {}
    for setting in sweep.settings:
        for rate in sweep.learning_rates:
            for seed in sweep.seeds:
                combination = Combination(setting, rate, seed)
                config = _config_of(combination, sweep, folder, config_class, source)
                configs[combination] = (
                    smoke(config).model_copy(update={"output": config.output}) if smoke else config
                )
    return Sweep(sweep, folder, configs)


def execute_sweep(
    sweep: Sweep[Config],
    run: Callable[[Config], None],
    speaker: Speaker,
    *,
    told: Callable[[Sequence[Result]], object],
) -> list[Result]:
    """Go through the runs that are not finished.

    Args:
        sweep: as read.
        run: executes one to its report.
        speaker: says which run it is.
        told: gets all results so far, after each run.

    Raises:
        StoreError: a run's folder was made with other settings.
        UserError: whatever a run meets, or a metric that it does not measure.
    """
    config, results = sweep.config, list[Result]()

    def execute(combination: Combination) -> None:
        title = f"Run {len(results) + 1} of {sweep.total}: {combination.label}"
        results.append(_execute(sweep, combination, run, speaker, title))
        told(results)

    first, *others = config.seeds
    for setting in config.settings:
        for tried in config.learning_rates:
            execute(Combination(setting, tried, first))
    chosen = {setting: chosen_rate(results, setting, config) for setting in config.settings}
    for setting, rate in chosen.items():
        if rate is None:
            speaker.say(f"  {setting}: the loss was not finite at any learning rate; not run any further")
        elif len(config.learning_rates) > 1:
            speaker.say(f"  {setting}: learning rate {rate:g}, chosen by {config.metrics[0]}")
    for seed in others:
        for setting, rate in chosen.items():
            if rate is not None:
                execute(Combination(setting, rate, seed))
    return results


def chosen_rate(results: Sequence[Result], setting: str, config: SweepConfig) -> float | None:
    """The learning rate that the first metric likes best with the first seed; of equal ones the lowest."""
    metric, best = config.metrics[0], None
    for result in sorted(results, key=lambda result: result.combination.learning_rate):
        score = result.score(metric)
        of = result.combination
        if (of.setting, of.seed) != (setting, config.seeds[0]) or score is None or result.report is None:
            continue
        sign = 1 if result.report["scores"]["student"][metric]["higher_is_better"] else -1
        if best is None or sign * score > best[0]:
            best = (sign * score, of.learning_rate)
    return None if best is None else best[1]


def _execute(
    sweep: Sweep[Config],
    combination: Combination,
    run: Callable[[Config], None],
    speaker: Speaker,
    title: str,
) -> Result:
    config = sweep.configs[combination]
    folder, finished = config.folder, config.folder / RUN_FINISHED
    Workspace(folder).refuse_other(config)
    if finished.exists():
        speaker.stage(f"{title} is there already, in {folder}")
    else:
        speaker.stage(title)
        try:
            run(config)
        except NonFiniteLossError as error:  # a learning rate that is too high loses: that is a result
            speaker.say(f"  {error}")
            return Result(combination, None)
    if not sweep.config.keep_models:
        for heavy in (folder / RUN_PRODUCT, *folder.glob("round-*/checkpoints")):
            shutil.rmtree(heavy, ignore_errors=True)
    result = Result(combination, json.loads(finished.read_text(encoding="utf-8")))
    for metric in (*sweep.config.metrics, *sweep.config.shown):
        if result.score(metric) is None:
            measured = (result.report or {}).get("scores", {}).get("student", {})
            raise UserError(f"{unknown_name('metric', metric, measured)} As {finished} has them.")
    return result


def _config_of(
    combination: Combination, sweep: SweepConfig, folder: Path, config_class: type[Config], source: str
) -> Config:
    values, where = copy.deepcopy(sweep.run), f"{source}: setting {combination.setting!r}"
    for key, value in sweep.settings[combination.setting].items():
        set_value(values, key, copy.deepcopy(value), where)
    given = (f"{sweep.name}-{combination.label}", str(folder / combination.label), combination.seed)
    for key, value in zip(GIVEN, (*given, combination.learning_rate), strict=True):
        set_value(values, key, value, where)
    return parse_values(values, config_class, where)


def _has(values: Mapping[str, Any], key: str) -> bool:
    *sections, last = key.split(".")
    node: Any = values
    for section in sections:
        node = node.get(section) if isinstance(node, Mapping) else None
    return isinstance(node, Mapping) and last in node
