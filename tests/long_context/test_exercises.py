"""The check of chapter 07's exercise accepts the right answer and refuses likely wrong ones."""

import math

import pytest

from qwenlib.long_context.exercises import check_exercise_1


def test_exercise_1(capsys):
    check_exercise_1(lambda K, L: (L / (2 * math.pi)) ** (K / (K - 2)))
    assert "right" in capsys.readouterr().out
    check_exercise_1(lambda K, L: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="slowest pair"):
        check_exercise_1(lambda K, L: L / (2 * math.pi))
