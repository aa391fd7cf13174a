"""`distill-eval`: list tasks, evaluate a model on them, score again, compare models.

Nothing heavy is imported before a command needs it, so that `--help` and `list` answer at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shared.cli import interruptible, run_app

app = typer.Typer(
    name="distill-eval",
    help="Evaluate models on instructions, code, maths and images, and say how much of a teacher is kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Include = Annotated[
    list[Path] | None, typer.Option("--include", help="A Python file with tasks of your own; it is run.")
]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--allow-unsafe-execution", help="Run programs that a model wrote even where nothing isolates them."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]


@app.command("list")
def list_tasks(as_json: AsJson = False, include: Include = None) -> None:
    """Tasks, suites, what each measures and needs, and which isolation of programs works here."""
    from eval.listing import describe, print_listing

    described = describe(include or [])
    if as_json:
        typer.echo(json.dumps(described, indent=1))
    else:
        print_listing(described)


@app.command()
def run(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf file, pkg://PACKAGE/FILE, or server:URL#MODEL.")
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK|SUITE|FILE.yaml... [KEY=VALUE]...",
            help="What to run, and settings: limit=100, gsm8k.data.path=FILE, model.system_prompt=...",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder; default evaluations/MODEL.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The first rows of each task only.")] = None,
    dtype: Annotated[str, typer.Option(help="Of a local model: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Of a local model; default a GPU if there is one.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt and reply tokens of one batch, padding included.")
    ] = 8192,
    include: Include = None,
    allow_unsafe_execution: Unsafe = False,
) -> None:
    """Ask a model all questions, then score. Run again, it goes on where it was."""
    from eval.evaluation import evaluate
    from shared.progress import Speaker

    with interruptible():
        evaluate(
            model,
            words if limit is None else [*words, f"limit={limit}"],
            output=output,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            includes=include or [],
            allow_unsafe_execution=allow_unsafe_execution,
            speaker=Speaker(),
        )


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    include: Include = None,
    allow_unsafe_execution: Unsafe = False,
) -> None:
    """Score the replies of a run anew; the model is not asked."""
    from eval.evaluation import score_again
    from shared.progress import Speaker

    with interruptible():
        score_again(
            folder, includes=include or [], allow_unsafe_execution=allow_unsafe_execution, speaker=Speaker()
        )


@app.command()
def compare(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER_DIR", help="The teacher's evaluation.")],
    start: Annotated[
        Path, typer.Argument(metavar="START_DIR", help="That of the student before distillation.")
    ],
    students: Annotated[list[Path], typer.Argument(metavar="STUDENT_DIR...", help="Those of students.")],
    control: Annotated[
        list[Path] | None,
        typer.Option("--control", help="A run of one of these models with images=removed; may be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for report.html and report.json.")] = Path(
        "comparison"
    ),
    include: Include = None,
    as_json: AsJson = False,
) -> None:
    """Say how much of the teacher's scores each student keeps, and show every reply side by side."""
    from eval.compare import compare as compare_runs
    from eval.report import page, report_data
    from eval.report_table import show
    from eval.suites import Registry
    from shared.progress import Speaker
    from shared.report.html import write_report

    compared = compare_runs([teacher, start, *students], Registry(include or []), controls=control or [])
    data = report_data(compared)
    write_report(output, page(compared), data)
    if as_json:
        typer.echo(json.dumps(data, indent=1, allow_nan=False))
        return
    speaker = Speaker()
    show(compared, speaker)
    speaker.say(f"Written: {output / 'report.html'}, {output / 'report.json'}")


def main() -> None:
    """Entry point of the console script."""
    run_app(app)
