"""The check of chapter 06's exercise accepts the right answer and refuses likely wrong ones."""

import math

import pytest

from qwenlib.training.exercises import check_exercise_1


def test_exercise_1(capsys):
    check_exercise_1(lambda loss, tokens, units: math.exp(loss * tokens / units))
    assert "right" in capsys.readouterr().out
    check_exercise_1(lambda loss, tokens, units: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="total loss"):
        check_exercise_1(lambda loss, tokens, units: math.exp(loss))
