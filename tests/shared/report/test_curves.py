"""Training curves from metrics rows: grouping, resumed runs, gaps, rounds and long runs."""

from shared.report.curves import MAX_POINTS, TRAINING_PANELS, Curve, Panel, training_curves
from shared.report.sections import Mark

ROWS = [
    {"step": 0, "round": 0, "heldout/kl": 1.7},
    {"step": 1, "round": 1, "train/loss": 1.0, "train/alpha_teacher": 0.1, "train/alpha_student": 0.1},
    {"step": 2, "round": 1, "train/loss": 0.8, "train/alpha_teacher": 0.1, "train/alpha_student": 0.1},
    {"step": 2, "round": 1, "heldout/kl": 1.2},
    {"step": 3, "round": 2, "train/loss": 0.7, "train/alpha_teacher": 0.05, "train/alpha_student": 0.02},
    {"step": 3, "round": 2, "example": {"prompt": "p"}},
    {"note": "a row without a step"},
]


def test_panels_hold_what_was_logged():
    panels = training_curves(ROWS).panels
    assert [panel.title for panel in panels] == [
        TRAINING_PANELS[i].title for i in (0, 1, 3)
    ]  # no nll beside a teacher
    loss, heldout, alpha = panels
    assert loss.series[0][:3] == ("loss", (1, 2, 3), (1.0, 0.8, 0.7))
    assert heldout.series[0].y == (1.7, 1.2)
    assert [(s.role, s.y) for s in alpha.series] == [
        ("teacher", (0.1, 0.1, 0.05)),
        ("student", (0.1, 0.1, 0.02)),
    ]
    assert (loss.x_title, loss.y_title) == ("optimiser step", "nats per token")


def test_rounds_are_marked_from_the_second_on():
    assert training_curves(ROWS).panels[0].marks == (Mark(2.5, "round 2"),)


def test_a_resumed_run_writes_a_step_again():
    rows = [*ROWS, {"step": 2, "round": 1, "train/loss": 0.9}]
    assert training_curves(rows).panels[0].series[0].y == (1.0, 0.9, 0.7)


def test_what_is_not_finite_is_a_gap():
    rows = [
        {"step": 1, "train/loss": float("nan")},
        {"step": 2, "train/loss": 1},
        {"step": 3, "train/loss": "x"},
    ]
    assert training_curves(rows).panels[0].series[0][1:3] == ((1, 2), (None, 1.0))


def test_long_runs_are_thinned_and_say_so():
    rows = [{"step": step, "x": float(step)} for step in range(3 * MAX_POINTS)]
    section = training_curves(rows, (Panel("X", "unit", (Curve("x", "x"),)),))
    steps = section.panels[0].series[0].x
    assert len(steps) == MAX_POINTS
    assert steps[-1] == 3 * MAX_POINTS - 1
    assert "one point in 3" in section.note


def test_nothing_logged():
    assert training_curves([]).panels == ()
