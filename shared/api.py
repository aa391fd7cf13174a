"""How is a run started from Python? The same objects, checks and stages as the command line's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared.config import RunConfig
from shared.config_files import dump_config, load_values, parse_config, parse_values
from shared.errors import ConfigError
from shared.recipe import is_recipe

if TYPE_CHECKING:
    from shared.cli import Modality
    from shared.progress import Speaker
    from shared.run import Stage

Config = TypeVar("Config", bound=RunConfig)
AnyConfig = RunConfig | Mapping[str, Any] | Path | str


@dataclass(frozen=True)
class Result:
    """What a finished run left in its folder."""

    folder: Path
    student: Path  # a plain transformers model folder
    report: Mapping[str, Any]  # report.json; docs/ARCHITECTURE.md lists its keys

    @property
    def scores(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """By model (teacher, start, student) and metric: value, stderr, n, higher_is_better."""
        scores: Mapping[str, Mapping[str, Mapping[str, Any]]] = self.report.get("scores", {})
        return scores


def distill_with(
    modality: Modality[Config],
    config: AnyConfig,
    overrides: Sequence[str],
    *,
    smoke: bool,
    quiet: bool,
) -> Result:
    """Run a configuration to its report, or go on with it where it was.

    Raises:
        UserError: whatever the user can mend; a recipe, which is for the command line.
    """
    from shared.check import smoke_config
    from shared.progress import Speaker

    run = read_config(config, modality.config_class, overrides)
    if smoke:
        run = smoke_config(run)  # type: ignore[assignment]
    run_once(modality, run, "report", Speaker(quiet=quiet))
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    return Result(run.folder, run.folder / "student", report)


def read_config(config: AnyConfig, config_class: type[Config], overrides: Sequence[str]) -> Config:
    """A configuration from whatever holds one.

    Args:
        config: a configuration, what a YAML file would hold, or the path of such a file.
        config_class: the modality's.
        overrides: `key.sub=value`, as on the command line.

    Raises:
        ConfigError: as `load_config`; a recipe.
    """
    if isinstance(config, RunConfig):
        return parse_config(dump_config(config), config_class, overrides, source=config.name)
    if isinstance(config, Mapping):  # JSON is YAML
        return parse_config(json.dumps(config, default=os.fspath), config_class, overrides)
    values = load_values(Path(config), overrides)
    if is_recipe(values):
        raise ConfigError(
            f"{config} is a recipe of several stages, and distill() runs one. Run it from the command line, "
            "or give the configuration of a stage."
        )
    return parse_values(values, config_class, str(config))


def run_once(modality: Modality[Any], config: RunConfig, until: Stage, speaker: Speaker) -> None:
    """Check a configuration and go through its stages.

    Raises:
        UserError: whatever the user can mend.
    """
    from shared.check import check_config

    check_config(config)
    modality.check_evaluation(config.evaluation, True)
    speaker.say(f"{config.name} → {config.folder}")
    from shared.run import Run  # seconds of imports

    run = Run(config, modality.kind(), evaluate=modality.evaluate(), speaker=speaker)
    run.execute(until)
    run.close()
