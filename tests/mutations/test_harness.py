"""The harness itself: it must not call a mutation caught that no test notices."""

import sys

import pytest

from qwenlib.post_training import dpo
from tests.mutations.harness import Mutation, assert_caught

MODULE = "qwenlib.post_training.dpo"
GUARD = "tests/post_training/test_dpo.py::test_naive_loop"
LINE = "delta_B = chosen_B - rejected_B\n"


def test_an_unnoticed_edit_fails():
    with pytest.raises(pytest.fail.Exception, match="still passes"):
        assert_caught(
            Mutation("no change", MODULE, LINE, "delta_B = -rejected_B + chosen_B\n", GUARD)
        )


def test_a_broken_edit_is_no_proof():
    with pytest.raises(NameError):
        assert_caught(Mutation("broken", MODULE, LINE, "delta_B = nonsense\n", GUARD))


def test_a_stale_edit_is_named():
    with pytest.raises(ValueError, match="stale"):
        assert_caught(Mutation("gone", MODULE, "no such line", "", GUARD))


def test_the_library_comes_back():
    before = dict(sys.modules)
    assert_caught(Mutation("sign", MODULE, LINE, "delta_B = rejected_B - chosen_B\n", GUARD))
    assert sys.modules[MODULE] is dpo
    assert {k for k in sys.modules if k.startswith("qwenlib")} == {
        k for k in before if k.startswith("qwenlib")
    }
