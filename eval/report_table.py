"""How does a terminal show a comparison? A table for each student, one for what the images add."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from eval.compare import Compared
from eval.sections import ROLES, difference_text, score_text, share_text
from shared.progress import Speaker
from shared.report.formats import MISSING


def show(compared: Compared, speaker: Speaker) -> None:
    """Print all figures."""
    for role, evaluation in compared.evaluations.items():
        table = _table(*map(str.capitalize, ROLES), "Retention", "Gap closed", "Less teacher")
        known = dict.fromkeys(name for of_role in evaluation.scores.values() for name in of_role)
        for name in (name for task in compared.tasks for name in known if name.startswith(f"{task}/")):
            _row(
                table,
                name,
                *(score_text(evaluation.scores[of].get(name)) for of in ROLES),
                share_text(evaluation.retention.get(name)),
                share_text(evaluation.gap_closed.get(name)),
                difference_text(evaluation.difference.get(name)),
            )
        speaker.say(f"{role}: {compared.runs[compared.roles.index(role)].model['name']}", style="bold")
        speaker.console.print(table)
    for role, control in compared.controls.items():
        table = _table("Without images", "Added by images")
        for name, found in control.scores.items():
            _row(table, name, score_text(found), difference_text(control.added[name]))
        speaker.say(f"{role} without images: {control.run.folder}", style="bold")
        speaker.console.print(table)
    speaker.say(
        "± standard error; in brackets 95 % intervals of a paired bootstrap, over images where shared."
    )
    if compared.left_out:
        speaker.say(f"Left out, since not all models did them: {', '.join(compared.left_out)}")


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    table.add_column("", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right")
    return table


def _row(table: Table, name: str, *cells: str | None) -> None:
    """Errors and intervals on a second line: all of it fits eighty columns."""
    lines = (MISSING if cell is None else cell.replace(" ±", "\n±").replace(" (", "\n(") for cell in cells)
    table.add_row(Text(name.replace("/", "\n")), *lines)
