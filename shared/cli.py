"""The command line that every modality shares: init, check, run, and the stages alone.

Nothing heavy is imported before a command needs it, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, NoReturn, TypeVar

import typer

from shared.api import run_once
from shared.config import EvaluationConfig, RunConfig
from shared.config_files import apply_override, load_values, parse_values
from shared.durable import write_atomically
from shared.errors import UserError, out_of_disk, unknown_name
from shared.recipe import (
    RUN_PRODUCT,
    RecipeConfig,
    StageKind,
    execute_recipe,
    expand,
    is_recipe,
    waiting_for,
)
from shared.sweep import Sweep, execute_sweep, include_run, is_sweep, open_sweep

if TYPE_CHECKING:
    from shared.adapter import AdapterKind
    from shared.preflight.page import Findings
    from shared.run import Evaluate, Stage

USER_MISTAKE = 2
INTERRUPTED = 130
_INTERRUPTED = "Interrupted; what was committed is kept. Run the same command again to go on from there."
# before the libraries are imported: a user's own setting goes first
_QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",  # their bars would break into ours
    "TOKENIZERS_PARALLELISM": "false",  # we fork for nothing, and its warning is noise
}

Config = TypeVar("Config", bound=RunConfig)


def _no_tasks(evaluation: EvaluationConfig, starting: bool) -> None:
    del starting
    if evaluation.tasks or evaluation.suites:
        raise UserError("evaluation.tasks and suites: this program evaluates no tasks. Remove them.")


class Modality(NamedTuple, Generic[Config]):
    """What a package adds to the shared commands."""

    program: str
    what: str
    templates: str  # folder below configs/
    config_class: type[Config]
    kind: Callable[[], AdapterKind]
    evaluate: Callable[[], Evaluate]
    # raises UserError; the second argument: the run is about to start, so data may be fetched
    check_evaluation: Callable[[EvaluationConfig, bool], None] = _no_tasks
    recipe_class: type[RecipeConfig] = RecipeConfig
    stage_kinds: Mapping[str, StageKind] = {}  # beside `run`


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; `init` writes one to edit.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that replace the file's.")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="SETTING", help="Run this setting of the sweep; can be given again."),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Every stage on a handful of samples, in NAME-smoke.")]


def build_app(modality: Modality[Config]) -> typer.Typer:
    """The commands of a modality."""
    app = typer.Typer(
        name=modality.program,
        help=f"Distil {modality.what}: sample, train on pairs, evaluate, report.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    products = {"run": RUN_PRODUCT, **{name: kind.product for name, kind in modality.stage_kinds.items()}}

    def read(
        path: Path, overrides: list[str] | None, *, smoke: bool = False
    ) -> Config | RecipeConfig | Sweep[Config]:
        values = load_values(path)
        if is_sweep(values):
            include_run(values, path)
        for override in overrides or ():
            apply_override(values, override)
        if is_sweep(values):
            from shared.check import smoke_config

            return open_sweep(values, modality.config_class, str(path), smoke=smoke_config if smoke else None)
        if not is_recipe(values):
            return parse_values(values, modality.config_class, str(path))
        expand(values, products, str(path), smoke=smoke)
        return parse_values(values, modality.recipe_class, str(path))

    def check_run(config: RunConfig, *, models: bool = True) -> dict[str, object]:
        from shared.check import check_config

        facts = check_config(config, models=models)
        modality.check_evaluation(config.evaluation, False)
        return facts

    def check_recipe(recipe: RecipeConfig) -> dict[str, object]:
        facts: dict[str, object] = {"recipe": recipe.name, "folder": str(recipe.folder)}
        for stage in recipe.stages:
            waits = waiting_for(stage, recipe, products)
            says = ", after ".join([stage.kind, *([",".join(waits)] if waits else [])])
            if stage.kind == "run":
                of_run = check_run(stage.run, models=not waits)
                says += f": {of_run['objective']}, {of_run['training prompts']} prompts"
            facts[f"stage {stage.name}"] = says
        return facts

    def check_sweep(sweep: Sweep[Config]) -> dict[str, object]:
        for config in sweep.one_each():  # rates and seeds differ in nothing that is looked at here
            check_run(config)
        return sweep.facts()

    @app.command()
    def init(
        template: Annotated[str, typer.Argument(help="Name of a template; `init list` shows them.")],
        path: Annotated[
            Path | None, typer.Argument(help="File to write; default TEMPLATE.yaml here.")
        ] = None,
    ) -> None:
        """Write a configuration to edit."""
        templates = find_templates(modality.templates)
        if template == "list":
            for name, text in templates.items():
                typer.echo(f"{name}: {text.splitlines()[0].lstrip('# ')}")
            return
        if template not in templates:
            raise UserError(unknown_name("template", template, templates))
        target = path or Path(f"{template}.yaml")
        if target.exists():
            raise UserError(
                f"{target} exists, and is not overwritten. Name another file: init {template} FILE"
            )
        shipped = f"configs/{modality.templates}/{template}.yaml"
        try:
            write_atomically(target, templates[template].replace(shipped, str(target)))  # in its own comments
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{target.parent} is not a folder. Make it first, or name another file."
            ) from None
        except PermissionError:
            raise UserError(f"{target} cannot be written. Name a file in a folder of yours.") from None
        typer.echo(f"Wrote {target}. Edit it, then: {modality.program} check {target}")

    @app.command()
    def check(
        config: ConfigPath,
        overrides: Overrides = None,
        models: Annotated[
            bool, typer.Option("--models", help="Load the models: alignment, memory, disk and time.")
        ] = False,
        estimate: Annotated[
            bool, typer.Option("--estimate", help="As --models, but from their configurations alone.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    ) -> None:
        """Check a configuration and its prompt files; without --models or --estimate, no model is read."""
        checked = read(config, overrides)
        recipe = isinstance(checked, RecipeConfig)
        command, facts = "run", dict[str, object]()
        if isinstance(checked, Sweep):
            command, facts = "sweep", check_sweep(checked)
        elif isinstance(checked, RecipeConfig):
            facts = check_recipe(checked)
        else:
            facts = check_run(checked)
        if not as_json:
            for name, value in facts.items():
                typer.echo(f"{name:22} {value}")
        problems: list[str] = []
        if models or estimate:
            for title, of_run in runs_of(checked):
                found = check_models_of(title, of_run, estimate=estimate, quiet=as_json)
                problems += found.problems
                facts[f"models of {title}" if recipe else "models"] = {
                    **found.facts, "problems": found.problems
                }  # fmt: skip
        if as_json:
            typer.echo(json.dumps(facts, indent=1))
        if problems:
            raise UserError(f"{len(problems)} problem(s) with these models and prompts: {' '.join(problems)}")
        if not as_json:
            again = shlex.join([str(config), *(overrides or ())])
            typer.echo(f"No problems found. Next: {modality.program} {command} {again}")

    def runs_of(checked: Config | RecipeConfig | Sweep[Config]) -> Iterator[tuple[str, RunConfig | str]]:
        """Each run by name; of a recipe's, those that wait for models are told with what they wait for."""
        one = checked.one_each()[0] if isinstance(checked, Sweep) else checked
        if isinstance(one, RunConfig):
            yield one.name, one
            return
        for stage in one.stages:
            if stage.kind == "run":
                waits = waiting_for(stage, one, products)
                yield stage.name, f"made by {', '.join(waits)}, not there yet" if waits else stage.run

    def check_models_of(title: str, config: RunConfig | str, *, estimate: bool, quiet: bool) -> Findings:
        from shared.preflight.page import Findings
        from shared.progress import Speaker

        speaker = Speaker(quiet=quiet)
        if isinstance(config, str):
            found = Findings(facts={"models": config})
            found.add(f"{title}: {config}", ())
        else:
            from shared.check import check_config
            from shared.preflight.check import check_models  # seconds of imports

            known: dict[str, Any] = check_config(config)
            found = check_models(
                config,
                modality.kind(),
                prompts=known["training prompts"],
                heldout=known["held-out prompts"],
                estimate=estimate,
            )
        found.show(speaker)
        return found

    def execute(path: Path, overrides: list[str] | None, until: Stage, *, smoke: bool = False) -> None:
        from shared.check import smoke_config
        from shared.progress import Speaker

        config = read(path, overrides, smoke=smoke)
        if isinstance(config, Sweep):
            raise UserError(f"{path} is a sweep of {config.total} runs. Use: {modality.program} sweep {path}")
        speaker = Speaker(quiet=os.environ.get("RANK", "0") != "0")  # a launcher numbers its processes

        def one_run(config: RunConfig) -> None:
            run_once(modality, config, until, speaker)

        with interruptible():
            if isinstance(config, RecipeConfig):
                if until != "report":
                    raise UserError(
                        f"{path} is a recipe of {len(config.stages)} stages, and {until} is a part of one. "
                        "Use run, which goes on where the recipe was."
                    )
                check_recipe(config)
                execute_recipe(
                    config, modality.stage_kinds, one_run, speaker, smoke=smoke_config if smoke else None
                )
            else:
                one_run(smoke_config(config) if smoke else config)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                # torch's teardown of gloo aborts one exit in a few ("terminate called without an active
                # exception"), and the launcher would call a finished run failed
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)

    @app.command()
    def run(config: ConfigPath, overrides: Overrides = None, smoke: Smoke = False) -> None:
        """Everything: sample, train, export, evaluate, report. Run again, it goes on where it was."""
        execute(config, overrides, "report", smoke=smoke)

    @app.command()
    def sweep(
        config: ConfigPath, overrides: Overrides = None, smoke: Smoke = False, only: Only = None
    ) -> None:
        """Compare settings of one run over learning rates and seeds. Run again, it goes on where it was."""
        from shared.progress import Speaker

        wanted = read(config, overrides, smoke=smoke)
        if not isinstance(wanted, Sweep):
            raise UserError(
                f"{config} names no settings to compare. Use: {modality.program} run {config}, or write a "
                "sweep as docs/SWEEPS.md shows."
            )
        wanted = wanted.only(only) if only else wanted
        check_sweep(wanted)
        for run in wanted.one_each():
            modality.check_evaluation(run.evaluation, True)
        speaker = Speaker()
        from shared.models.loaded_once import LoadedOnce  # seconds of imports
        from shared.run import Run
        from shared.sweep_report import say_sweep, sweep_data, write_sweep

        runs = wanted.configs.values()
        kind = LoadedOnce(
            modality.kind(), [*(r.teacher.model for r in runs if r.teacher), *(r.origin for r in runs)]
        )

        def one_run(config: RunConfig) -> None:
            run = Run(config, kind, evaluate=modality.evaluate(), speaker=speaker, shares=True)
            run.execute()
            run.close()

        with interruptible():
            # of some settings nothing is written: another process may be at the others
            told = sweep_data if only else write_sweep
            results = execute_sweep(wanted, one_run, speaker, told=lambda results: told(wanted, results))
            say_sweep(told(wanted, results), speaker, None if only else wanted.folder)

    @app.command()
    def generate(config: ConfigPath, overrides: Overrides = None) -> None:
        """Sample the responses of the round at hand."""
        execute(config, overrides, "generate")

    @app.command()
    def train(config: ConfigPath, overrides: Overrides = None) -> None:
        """Finish the round at hand: sample what is missing, then train."""
        execute(config, overrides, "train")

    @app.command()
    def export(config: ConfigPath, overrides: Overrides = None) -> None:
        """Finish training and write the student as a plain model folder."""
        execute(config, overrides, "export")

    @app.command()
    def report(config: ConfigPath, overrides: Overrides = None) -> None:
        """Finish what is left, evaluate, and write report.html and report.json anew."""
        execute(config, overrides, "report")

    return app


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is one message and an exit code of its own; caught here, because typer swallows it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho(f"\n{_INTERRUPTED}", fg="yellow", err=True)
        raise typer.Exit(INTERRUPTED) from None


def find_templates(folder: str) -> dict[str, str]:
    """The shipped configurations of a modality, by name."""
    # beside this package, in a wheel as in a checkout; imported by name, it could be anybody's `configs`
    root = Path(__file__).resolve().parents[1] / "configs" / folder
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(root.glob("*.yaml"))}


def run_app(app: typer.Typer) -> None:
    """Run a command line: a user's mistake is one message and exit code 2, Ctrl-C leaves a resumable run."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    # peft imports it if it is there, and it misses a package for products that we do not use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    try:
        app(standalone_mode=True)
    except UserError as error:
        _fail(error)
    except OSError as error:  # a disk can fill anywhere
        explained = out_of_disk(error, Path(error.filename or "a file"))
        if explained is error:
            raise
        _fail(explained)


def _fail(error: Exception) -> NoReturn:
    typer.secho(f"Error: {error}", fg="red", err=True)
    sys.exit(USER_MISTAKE)
