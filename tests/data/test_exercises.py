import pytest

from qwenlib.data.decontamination import lcs_length
from qwenlib.data.exercises import check_exercise_1, check_exercise_2


def test_stubs_are_not_solved_yet(capsys):
    check_exercise_1(lambda a, b: None)
    check_exercise_2(lambda: None)
    assert capsys.readouterr().out.count("not solved yet") == 2


def test_right_answers_pass(capsys):
    check_exercise_1(lcs_length)
    check_exercise_2(lambda: (18, 7))
    assert capsys.readouterr().out.count("correct") == 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: len(set(a) & set(b)),
        lambda a, b: sum(x == y for x, y in zip(a, b, strict=False)),
        lambda a, b: lcs_length(a, b) + 1,
        lambda a, b: 0,
    ],
)
def test_wrong_lcs_is_refused(wrong):
    with pytest.raises(AssertionError, match="LCS"):
        check_exercise_1(wrong)


@pytest.mark.parametrize(
    ("wrong", "hint"), [((16, 16), "256 hashes"), ((2, 8), "more bands"), ((40, 2), "more rows")]
)
def test_wrong_bands_are_refused(wrong, hint):
    with pytest.raises(AssertionError, match=hint):
        check_exercise_2(lambda: wrong)
