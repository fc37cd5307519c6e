"""Schedules: end points and shapes."""

import pytest

from qwenlib.training.schedule import SCHEDULES, learning_rate_at

STEPS, PEAK, WARMUP, RATIO = 101, 2e-3, 10, 0.1


def curve(schedule):
    return [learning_rate_at(s, STEPS, PEAK, WARMUP, schedule, RATIO) for s in range(STEPS)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_end_points(schedule):
    rates = curve(schedule)
    assert rates[0] == pytest.approx(PEAK / WARMUP)  # the first step already moves
    assert rates[WARMUP - 1] == rates[WARMUP] == pytest.approx(PEAK)
    assert rates[-1] == pytest.approx(PEAK if schedule == "constant" else PEAK * RATIO)
    assert all(a < b for a, b in zip(rates[: WARMUP - 1], rates[1:WARMUP]))
    assert all(a >= b for a, b in zip(rates[WARMUP:], rates[WARMUP + 1 :]))


def test_half_way():
    middle = (STEPS - 1 - WARMUP) // 2 + WARMUP
    half = PEAK * (1 + RATIO) / 2
    assert curve("linear")[middle] == pytest.approx(half)
    assert curve("cosine")[middle] == pytest.approx(half)
    assert curve("wsd")[middle] == PEAK == curve("wsd")[80]
    assert curve("wsd")[90] < PEAK


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="cosin.*choose one of"):
        learning_rate_at(5, 10, 1.0, 1, "cosin", 0.1)
