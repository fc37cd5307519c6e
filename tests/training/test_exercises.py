"""The checks of chapter 06's exercises accept the right answer and refuse likely wrong ones."""

import math
from statistics import median

import pytest

from qwenlib.model.accounting import flops_per_token
from qwenlib.training.exercises import (
    check_exercise_1,
    check_exercise_2,
    check_exercise_3,
    check_exercise_4,
)


def test_exercise_1(capsys):
    check_exercise_1(lambda loss, tokens, units: math.exp(loss * tokens / units))
    assert "right" in capsys.readouterr().out
    check_exercise_1(lambda loss, tokens, units: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="total loss"):
        check_exercise_1(lambda loss, tokens, units: math.exp(loss))


def test_exercise_2(capsys):
    check_exercise_2(lambda counts: [count / sum(counts) for count in counts])
    assert "right" in capsys.readouterr().out
    check_exercise_2(lambda counts: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="equal weights"):
        check_exercise_2(lambda counts: [1 / len(counts)] * len(counts))
    with pytest.raises(AssertionError, match="all tokens once"):
        check_exercise_2(lambda counts: counts)


def mfu(factor=1.0, training=True, length=None):
    def answer(config, rows, speed, peak):
        return factor * speed * flops_per_token(config, length or rows, training) / peak

    return answer


def test_exercise_3(capsys):
    check_exercise_3(mfu())
    assert "right" in capsys.readouterr().out
    check_exercise_3(lambda *arguments: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="backward pass"):
        check_exercise_3(mfu(training=False))
    with pytest.raises(AssertionError, match="grow with the length"):
        check_exercise_3(mfu(length=256))


def spikes(losses, factor, remember=False):
    kept, found = [], []
    for step, loss in enumerate(losses):
        bad = step > 2 and loss > factor * median(kept)
        found += [step] if bad else []
        kept += [loss] if remember or not bad else []
    return found


def test_exercise_4(capsys):
    check_exercise_4(spikes)
    assert "right" in capsys.readouterr().out
    check_exercise_4(lambda losses, factor: None)
    assert "not solved yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="stays out of the median"):
        check_exercise_4(lambda losses, factor: spikes(losses, factor, remember=True))
    with pytest.raises(AssertionError, match="first three"):
        check_exercise_4(lambda losses, factor: [i for i, x in enumerate(losses) if x > 3])
