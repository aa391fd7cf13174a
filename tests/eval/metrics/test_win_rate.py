"""The win rate: means by hand, and a length control that recovers what a simulated judge would say."""

import math

import numpy as np
import pytest

from eval.checks import InputError
from eval.metrics.win_rate import _fit, _losses, compute


def simulated(theta: float, phi: float, n: int, seed: int) -> dict[str, list]:
    """A judge with a taste for length, and a model whose answers are longer."""
    random = np.random.default_rng(seed)
    baseline = random.integers(200, 2_000, n)
    model = np.maximum(1, baseline + random.normal(400, 500, n)).astype(int)
    difference = model - baseline
    logits = theta + phi * np.tanh(difference / difference.std())
    preferred = random.random(n) < 1 / (1 + np.exp(-logits))
    return {
        "preferences": preferred.astype(float).tolist(),
        "model_lengths": model.tolist(),
        "baseline_lengths": baseline.tolist(),
    }


def test_plain_by_hand():
    # 1, 1, 1/2, 0: mean 5/8, variance (2 (3/8)² + (1/8)² + (5/8)²) / 3 = 11/48, error sqrt(11/192)
    result = compute(preferences=[1, 1, 0.5, 0])
    assert result == {"win_rate": 0.625, "stderr": pytest.approx(math.sqrt(11 / 192)), "n": 4}


@pytest.mark.parametrize(("theta", "phi"), [(-0.5, 1.5), (0.8, 0.7), (0.0, 0.0)])
def test_recovers_the_preference_at_equal_length(theta, phi):
    result = compute(**simulated(theta, phi, 20_000, seed=1))
    truth = 1 / (1 + math.exp(-theta))
    assert result["length_controlled_win_rate"] == pytest.approx(truth, abs=0.015)
    assert result["length_controlled_stderr"] < 0.006
    if phi:
        assert result["win_rate"] > truth + 0.05  # longer answers won more than they should


def test_the_standard_error_is_that_of_repeated_judgements():
    results = [compute(**simulated(0.3, 1.0, 500, seed)) for seed in range(80)]
    spread = np.std([result["length_controlled_win_rate"] for result in results], ddof=1)
    stated = np.mean([result["length_controlled_stderr"] for result in results])
    assert stated == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("difference", [0, 300])
def test_without_a_spread_of_lengths_it_is_the_plain_rate(difference):
    result = compute([1, 1, 0.5, 0], [100 + difference] * 4, [100] * 4)
    assert result["length_controlled_win_rate"] == pytest.approx(result["win_rate"], abs=1e-5)
    assert result["length_controlled_stderr"] == pytest.approx(result["stderr"], rel=1e-4)


def test_swapping_model_and_baseline_mirrors_the_rate():
    given = simulated(0.4, 1.2, 300, seed=2)
    swapped = compute(
        [1 - p for p in given["preferences"]], given["baseline_lengths"], given["model_lengths"]
    )
    ours = compute(**given)["length_controlled_win_rate"]
    assert swapped["length_controlled_win_rate"] == pytest.approx(1 - ours, abs=1e-9)


def test_the_unit_of_length_does_not_matter():
    given = simulated(0.4, 1.2, 300, seed=3)
    tenfold = {k: [10 * x for x in v] if k != "preferences" else v for k, v in given.items()}
    assert compute(**tenfold) == pytest.approx(compute(**given))


def test_two_groups_solve_by_hand():
    # Win rates 3/4 at x = 1 and 1/2 at x = -1: θ + φ = logit 3/4 = log 3 and θ - φ = logit 1/2 = 0
    length = np.array([1.0] * 4 + [-1.0] * 4)
    preferred = np.array([1, 1, 1, 0, 1, 1, 0, 0], dtype=float)
    theta, phi = _fit(length, preferred, penalty=0)
    assert (theta, phi) == pytest.approx((math.log(3) / 2, math.log(3) / 2), abs=1e-4)


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10])
def test_the_fit_is_the_minimum(penalty):
    random = np.random.default_rng(4)
    length, preferred = np.tanh(random.normal(1, 1, 50)), random.random(50)

    def objective(theta: float, phi: float) -> float:
        return _losses(theta + phi * length, preferred).mean() + 1e-6 / 2 * theta**2 + penalty / 2 * phi**2

    theta, phi = _fit(length, preferred, penalty)
    around = [objective(theta + a, phi + b) for a in (-1e-3, 0, 1e-3) for b in (-1e-3, 0, 1e-3) if a or b]
    assert objective(theta, phi) < min(around)


@pytest.mark.parametrize("won", [0, 1])
def test_one_sided_preferences_stay_finite(won):
    result = compute([won] * 20, list(range(20)), [5] * 20)
    assert result["length_controlled_win_rate"] == pytest.approx(won, abs=1e-3)
    assert math.isfinite(result["length_controlled_stderr"])


def test_length_that_explains_everything_stays_finite():
    result = compute([1] * 10 + [0] * 10, [200] * 10 + [50] * 10, [100] * 20)
    assert 0.2 < result["length_controlled_win_rate"] < 0.8


def test_one_sample():
    result = compute([1], [10], [5])
    assert (result["stderr"], result["length_controlled_stderr"]) == (None, None)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (([1, 1.5], [1, 1], [1, 1]), r"preferences\[1\] is 1.5; allowed is a number from 0 to 1"),
        (([1, float("nan")], [1, 1], [1, 1]), r"preferences\[1\] is nan"),
        (([1, None], [1, 1], [1, 1]), r"preferences\[1\] is None"),
        (([1, "0.5"], [1, 1], [1, 1]), r"preferences\[1\] is '0.5'"),
        (([1, 0], [1, -1], [1, 1]), r"model_lengths\[1\] is -1; allowed is an integer of at least 0"),
        (([1, 0], [1, 1], [1, 1.5]), r"baseline_lengths\[1\] is 1.5"),
        (([1, 0], [1, 1], [1]), r"\[1\] has no partner in baseline_lengths"),
        (([1, 0], [1, 1], None), r"baseline_lengths is None"),
        (([], [], []), r"preferences is empty"),
    ],
)
def test_bad_input_names_the_index(inputs, message):
    with pytest.raises(InputError, match=message):
        compute(*inputs)
