"""What do the committed results look like? One drawing for docs/PERFORMANCE.md.

    python benchmarks/plot.py

Bars are how many times as long another way takes as this project's; left of the line at 1, it is faster.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "docs" / "performance.svg"
LABELS = {
    "products": "the matrix products alone",
    "large_products": "the products, 1,024 rows at a time",
    "plain": "full logits, one divergence a row",
    "naive": "full logits, both divergences",
    "compiled": "ours, by torch.compile",
    "trl_chunked": "TRL chunked_divergence",
    "trl_full": "TRL GKD, full logits",
    "trl": "TRL GKDTrainer",
    "separate_full": "separate layout, full logits",
}
WIDTH, ROW, HEAD, LEFT, RIGHT = 760, 22, 34, 270, 60  # px


class Group(NamedTuple):
    """Bars under one heading."""

    title: str
    bars: list[tuple[str, float]]


def groups() -> list[Group]:
    """What the files hold, each case a group."""
    found = []
    for case in _read("loss_core")["time"][:2]:  # SmolLM2's sizes, either head; the rest is a table
        title = (
            f"loss, {case['rows']} rows, V = {case['vocabulary']:,}, D = {case['width']}, {case['head']} head"
        )
        bars = [(LABELS[name], 1 / ratio) for name, ratio in case["fused_over"].items()]
        found.append(Group(title, bars))
    for case in _read("train_step")["cases"]:
        title = f"step, prompt {case['prompt']}, responses {'/'.join(map(str, case['responses']))}"
        found.append(Group(title, [(LABELS[n], ratio) for n, ratio in case["joint_is_faster_than"].items()]))
    return found


def svg(found: list[Group]) -> str:
    """The drawing, readable on light and dark pages."""
    longest = max(value for group in found for _, value in group.bars)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts, y = [], 8
    for group in found:
        parts.append(f'<text x="8" y="{y + 20}" font-weight="bold">{escape(group.title)}</text>')
        y += HEAD
        for label, value in group.bars:
            middle = y + ROW / 2 + 4
            parts += [
                f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>',
                f'<rect x="{LEFT}" y="{y + 3}" width="{value * scale:.1f}" height="{ROW - 6}" '
                'fill="#4878a8"/>',
                f'<text x="{LEFT + value * scale + 6:.1f}" y="{middle}">{value:.2f}</text>',
            ]
            y += ROW
    one = LEFT + scale
    line = f'<line x1="{one:.1f}" x2="{one:.1f}" y1="8" y2="{y}" stroke="#c0504d" stroke-dasharray="4 3"/>'
    note = f'<text x="{one:.1f}" y="{y + 16}" text-anchor="middle">1 = as long as ours</text>'
    height = y + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="13" fill="#222">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}{line}{note}</svg>\n'
    )


def _read(name: str) -> dict:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    TARGET.write_text(svg(groups()))
    print(TARGET)
