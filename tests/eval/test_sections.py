"""Teacher, start and student compared: the report's data, its charts, and pairs that do not match."""

import json
import math

import pytest

from eval.scores import Column, Metric, sample_means, score
from eval.sections import comparison, comparison_sections, summary_section
from shared.report.html import render
from shared.report.sections import Report

METRICS = {
    "kl": Metric("KL", "nats per token", False),
    "overlap": Metric("Overlap", "share", True),
    "perplexity": Metric("Perplexity", "perplexity", False, exponential=True),
    "unused": Metric("Unused", "share", True),
}
IDS = tuple("abcdefgh")


def column(*values):
    return Column(IDS[: len(values)], values)


TEACHER = {"kl": column(0, 0, 0), "overlap": column(1, 1, 1), "perplexity": column(0, 0, 0)}
START = {"kl": column(2, 1, 3), "overlap": column(0.2, 0.3, 0.1), "perplexity": column(1, 1, 1)}
STUDENT = {"kl": column(1, 0.5, 1.5), "overlap": column(0.6, 0.65, 0.55), "perplexity": column(0.5, 0.5, 0.5)}


@pytest.fixture
def compared():
    return comparison(METRICS, teacher=TEACHER, start=START, student=STUDENT)


def test_the_data_of_report_json(compared):
    data = json.loads(json.dumps(compared.data(), allow_nan=False))
    assert data.keys() == {"scores", "retention", "gap_closed", "difference"}
    assert list(data["scores"]) == ["teacher", "start", "student"]
    student_kl = {
        "value": 1.0,
        "stderr": pytest.approx(0.5 / math.sqrt(3)),
        "n": 3,
        "higher_is_better": False,
    }
    assert data["scores"]["student"]["kl"] == student_kl
    assert list(data["retention"]) == ["overlap"]
    assert data["retention"]["overlap"]["value"] == pytest.approx(0.6)
    low, high = data["retention"]["overlap"]["low"], data["retention"]["overlap"]["high"]
    assert 0.55 <= low < 0.6 < high <= 0.65
    assert data["difference"]["kl"] == pytest.approx({"value": 1.0, "low": 0.5, "high": 1.5}, abs=0.01)
    # every sample's KL was halved, so half the gap is closed in every resample
    assert data["gap_closed"]["kl"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_perplexity_is_compared_as_perplexity(compared):
    expected = (math.exp(0.5) - math.e) / (1 - math.e)
    assert compared.gap_closed["perplexity"]["value"] == pytest.approx(expected)


def test_samples_are_paired_by_id_not_by_place():
    shuffled = {"overlap": Column(("c", "a", "b"), (0.55, 0.6, 0.65))}
    first = comparison(METRICS, teacher=TEACHER, start=START, student=STUDENT)
    second = comparison(METRICS, teacher=TEACHER, start=START, student=shuffled)
    assert second.gap_closed["overlap"] == pytest.approx(first.gap_closed["overlap"])
    assert "kl" not in second.gap_closed
    assert "kl" in second.scores["start"]


def test_several_draws_are_averaged_within_their_sample():
    means = sample_means([Column(("a", "b"), (1, 2)), Column(("b", "a", "b"), (1, 7, 2))])
    assert [m.tolist() for m in means] == [[1, 2], [7, 1.5]]


def test_other_samples_are_refused():
    other = {"overlap": Column(("a", "b", "z"), (0.1, 0.2, 0.3))}
    with pytest.raises(ValueError, match=r"'c'|'z'"):
        comparison(METRICS, teacher=TEACHER, start=START, student=other)


def test_delta_method():
    result = score(METRICS["perplexity"], column(1.0, 3.0))
    assert result["value"] == pytest.approx(math.exp(2))
    assert result["stderr"] == pytest.approx(math.exp(2) * 1.0)


def test_sections(compared):
    bars, table = comparison_sections(compared, METRICS)
    assert [panel.x_title for panel in bars.panels] == [
        "nats per token, lower is better",
        "share, higher is better",
        "perplexity, lower is better",
        "(student − start) / (teacher − start)",  # retention would repeat the student's scores
    ]
    assert [series.role for series in bars.panels[0].series] == ["teacher", "start", "student"]
    assert bars.panels[0].series[2].bars[0].value == 1.0
    assert bars.panels[3].categories == ("KL", "Overlap", "Perplexity")
    assert [row[0] for row in table.rows] == ["KL", "Overlap", "Perplexity"]
    assert table.rows[1][4].startswith("60.0 %")
    assert table.rows[0][4] is None


def test_retention_has_bars_where_the_teacher_is_not_perfect():
    teacher = {"overlap": column(0.8, 0.9, 1.0)}
    compared = comparison(METRICS, teacher=teacher, start=START, student=STUDENT)
    panel = comparison_sections(compared, METRICS)[0].panels[-2]
    assert panel.x_title == "student / teacher"
    assert panel.series[0].bars[0].value == pytest.approx(0.6 / 0.9)


def test_tiles():
    compared = comparison(METRICS, teacher=TEACHER, start=START, student=STUDENT)
    kl, overlap = summary_section(compared, METRICS, ["kl", "overlap", "unused"]).tiles
    assert kl == ("KL", "1.00", "nats per token, start 2.00, teacher 0")
    assert overlap == ("Overlap", "60.0 %", "start 20.0 %, teacher 100.0 %")


def test_a_single_prompt_still_makes_a_report():
    one = {"overlap": column(0.5)}
    compared = comparison(
        METRICS, teacher={"overlap": column(1.0)}, start={"overlap": column(0.5)}, student=one
    )
    assert compared.retention["overlap"] == {"value": 0.5, "low": None, "high": None}
    assert compared.gap_closed["overlap"]["value"] == 0.0
    assert "Overlap" in render(Report("t", "", tuple(comparison_sections(compared, METRICS))))
