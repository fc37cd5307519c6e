"""The check of chapter 12's exercise accepts the right answer and refuses likely wrong ones."""

import math

import pytest

from qwenlib.evaluation.exercises import check_exercise_1


def two_sided(b, c):
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n
    return min(1.0, 2 * tail)


def test_exercise_1(capsys):
    check_exercise_1(two_sided)
    assert "right" in capsys.readouterr().out
    check_exercise_1(lambda b, c: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="both tails"):
        check_exercise_1(lambda b, c: two_sided(b, c) / 2)
