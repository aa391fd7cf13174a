"""Panels as figures: colours by role, markers, marks, error bars, and inputs at the edges."""

import itertools
import json

import pytest

from shared.report.charts import bar_figure, colors, curve_figure
from shared.report.formats import axis_number, cell, percent, plus_minus
from shared.report.sections import Bar, BarPanel, BarSeries, CurvePanel, Mark, Series


def curves(*series, marks=()):
    return curve_figure(CurvePanel("Loss", "step", "nats", series, marks))


def test_a_role_has_one_colour_and_others_differ():
    assert colors(["student", None, "teacher", None]) == ["student", "series-1", "teacher", "series-2"]
    figure = curves(Series("a", (1,), (2.0,), "start"), Series("b", (1,), (2.0,)))
    assert [trace["line"]["color"] for trace in figure["data"]] == ["@start", "@series-1"]


def test_few_points_are_marked_and_many_are_not():
    few, many = tuple(range(5)), tuple(range(500))
    assert curves(Series("a", few, few))["data"][0]["mode"] == "lines+markers"
    assert curves(Series("a", many, many))["data"][0]["mode"] == "lines"


def test_a_single_point_has_room_around_it():
    assert curves(Series("a", (3,), (1.0,)))["layout"]["xaxis"]["range"] == [2, 4]


def test_gaps_marks_and_axis_titles():
    figure = curves(Series("a", (1, 2, 3), (1.0, None, 2.0)), marks=(Mark(2.5, "round 2"),))
    assert figure["data"][0]["y"] == [1.0, None, 2.0]
    layout = figure["layout"]
    assert [layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")] == ["step", "nats"]
    assert (layout["shapes"][0]["x0"], layout["annotations"][0]["text"]) == (2.5, "round 2")


def test_bars_do_not_overlap_and_carry_their_intervals():
    teacher = BarSeries("teacher", (Bar(1.0, 1.0, 1.0), Bar(2.0, 1.5, 2.25)), "teacher")
    student = BarSeries("student", (Bar(0.5), Bar(None)), "student")
    figure = bar_figure(BarPanel("t", "nats", ("first", "second"), (teacher, student)))
    bars = [trace for trace in figure["data"] if trace["type"] == "bar"]
    rows = sorted(y for trace in bars for y in trace["y"])
    assert min(b - a for a, b in itertools.pairwise(rows)) >= bars[0]["width"]
    assert bars[0]["error_x"]["array"] == [0, 0.25]
    assert bars[0]["error_x"]["arrayminus"] == [0, 0.5]
    assert bars[1]["x"] == [0.5, None]
    texts = [trace["text"] for trace in figure["data"] if trace["type"] == "scatter"]
    assert [[text.strip() for text in row] for row in texts] == [["1.00", "2.00"], ["0.500", "no value"]]
    assert figure["layout"]["xaxis"]["range"] == [0, pytest.approx(1.04 * 2.25)]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["first", "second"]


def test_percentages_and_negative_bars():
    series = BarSeries("student", (Bar(-0.5, -0.7, -0.3),))
    figure = bar_figure(BarPanel("t", "share", ("gap",), (series,), percent=True))
    assert figure["data"][1]["text"] == ["  -50.0 %"]
    assert figure["data"][1]["x"] == [0]  # right of the axis, clear of the bar
    low, high = figure["layout"]["xaxis"]["range"]
    assert low == pytest.approx(-0.728) and high > 0
    assert figure["data"][0]["customdata"] == ["student: -50.0 % (-70.0 % to -30.0 %)"]


@pytest.mark.parametrize(
    "panel", [BarPanel("t", "x", (), ()), BarPanel("t", "x", ("a",), (BarSeries("s", (Bar(None),)),))]
)
def test_empty_panels_are_figures_too(panel):
    json.dumps(bar_figure(panel), allow_nan=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.7345, "1.73"),
        (0.01234, "0.0123"),
        (1234.5, "1,234"),
        (2e-5, "2.00e-05"),
        (3.2e9, "3.2e+09"),
        (100.0, "100"),
    ],
)
def test_axis_numbers(value, text):
    assert axis_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("a", "a"),
        (1234567, "1,234,567"),
        (True, "True"),
        (0.0, "0"),
        (0.862345, "0.8623"),
        (123456.7, "123,457"),
        (4e-4, "0.0004"),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


def test_percent():
    assert percent(0.5014) == "50.1 %"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.86023, 0.0312, "0.860 ± 0.031"),
        (10.77, 0.3, "10.77 ± 0.30"),
        (1234.5, 96.0, "1,234 ± 96"),
        (1.0, 0.0, "1"),
        (1.0, 3e-9, "1"),
        (0.5, None, "0.5"),
    ],
)
def test_values_with_their_error(value, error, text):
    assert plus_minus(value, error) == text
