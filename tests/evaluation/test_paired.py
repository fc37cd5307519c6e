"""Intervals: scipy's Wilson interval, coverage of the paired bootstrap, and its use of pairs."""

import numpy as np
import pytest

from qwenlib.evaluation.paired import paired_difference, wilson_interval


@pytest.mark.parametrize("hits,trials", [(0, 10), (10, 10), (3, 7), (812, 1319), (1, 1)])
def test_wilson_equals_scipy(hits, trials):
    from scipy.stats import binomtest

    want = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, trials) == pytest.approx((want.low, want.high), abs=1e-4)


@pytest.mark.parametrize("hits,trials", [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses(hits, trials):
    with pytest.raises(ValueError, match=f"{hits} of {trials}"):
        wilson_interval(hits, trials)


def test_equal_models_differ_by_exactly_nothing():
    scores = [1.0, 0.0, 1.0, 1.0]
    got = paired_difference(scores, scores)
    assert (got.difference, got.low, got.high) == (0.0, 0.0, 0.0)


def test_the_second_model_minus_the_first():
    got = paired_difference([0.0] * 50 + [1.0] * 50, [1.0] * 30 + [0.0] * 20 + [1.0] * 50)
    assert got.difference == pytest.approx(0.3)
    assert 0 < got.low < 0.3 < got.high


def test_pairing_narrows_the_interval():
    """Two models that agree on all but 4 of 200 questions: chance cannot hide the difference."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 200).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:4]] = 1.0
    paired = paired_difference(first, second)
    shuffled = paired_difference(first, rng.permutation(second))
    assert paired.high - paired.low < 0.3 * (shuffled.high - shuffled.low)


def test_interval_covers_the_truth():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        first = (rng.random(120) < 0.5).astype(float)
        second = (rng.random(120) < 0.6).astype(float)
        got = paired_difference(first, second, seed=trial, draws=400)
        hits += got.low <= 0.1 <= got.high
    assert 0.9 <= hits / 200 <= 0.99


def test_seeded_and_refuses_unequal_lengths():
    first, second = [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]
    assert paired_difference(first, second) == paired_difference(first, second)
    for bad in ([], [1.0]):
        with pytest.raises(ValueError, match="same questions"):
            paired_difference(bad, second)
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([], [])
