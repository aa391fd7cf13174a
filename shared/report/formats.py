"""How is a number written for a reader?"""

from __future__ import annotations

import math

from shared.report.sections import Cell

MISSING = "–"


def axis_number(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes: 0.0123, 1.73, 1,234."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.3g}"
    if size < 1e-4:
        return f"{value:.2e}"
    return f"{value:#.3g}".rstrip(".")


def plus_minus(value: float, error: float | None) -> str:
    """A value with its error to two significant digits, and the value to the same decimals: 0.860 ± 0.031.

    An error of a millionth of the value is rounding, and left out.
    """
    if not error or error < 1e-6 * abs(value):
        return cell(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def percent(value: float) -> str:
    """A share as a percentage with one decimal: 0.5 is 50.0 %."""
    return f"{100 * value:.1f} %"


def cell(value: Cell) -> str:
    """A cell of a table: whole numbers whole, others to four significant digits, None as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, int):  # True and False too: as the words
        return str(value) if isinstance(value, bool) else f"{value:,}"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
