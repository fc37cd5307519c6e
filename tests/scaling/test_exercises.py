import numpy as np
import pytest

from qwenlib.scaling import exercises


def test_checkers_accept_right_answers_and_stubs(capsys):
    exercises.check_exercise_1(lambda r, delta: np.clip(r, -delta, delta))
    exercises.check_exercise_2(lambda law, C: law.compute_optimal(C))
    exercises.check_exercise_1(lambda r, delta: None)
    exercises.check_exercise_2(lambda law, C: None)
    assert capsys.readouterr().out.count("not solved yet") == 2


@pytest.mark.parametrize(
    "wrong",
    [lambda r, d: r, lambda r, d: np.sign(r) * d, lambda r, d: np.clip(np.abs(r), 0, d)],
)
def test_wrong_derivatives_are_refused(wrong):
    with pytest.raises(AssertionError):
        exercises.check_exercise_1(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda law, C: (1e9, 1e9),
        lambda law, C: ((C / 6) ** 0.5, (C / 6) ** 0.5),
        lambda law, C: law.compute_optimal(C, 2.0),
    ],
)
def test_wrong_splits_are_refused(wrong):
    with pytest.raises(AssertionError):
        exercises.check_exercise_2(wrong)
