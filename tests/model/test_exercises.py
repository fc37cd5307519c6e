"""The checks of chapter 01's exercises accept the right answer, refuse others, know the stub."""

import pytest
import torch

from qwenlib.model.accounting import kv_bytes_per_token, parameter_count
from qwenlib.model.exercises import check_exercise_1, check_exercise_2


def right(config, memory_bytes, context):
    free = memory_bytes - 2 * parameter_count(config).total
    return max(0, int(free // (kv_bytes_per_token(config) * context)))


def no_weights(config, memory_bytes, context):
    return int(memory_bytes // (kv_bytes_per_token(config) * context))


def negative(config, memory_bytes, context):
    free = memory_bytes - 2 * parameter_count(config).total
    return int(free // (kv_bytes_per_token(config) * context))


def test_exercise_1():
    assert check_exercise_1(right)
    assert not check_exercise_1(lambda *_: None)
    with pytest.raises(AssertionError, match="subtract"):
        check_exercise_1(no_weights)
    with pytest.raises(AssertionError, match="the answer is 0"):
        check_exercise_1(negative)


def test_exercise_2():
    assert check_exercise_2(lambda x: torch.cat([x[..., 0::2], x[..., 1::2]], -1))
    assert not check_exercise_2(lambda x: NotImplemented)
    with pytest.raises(AssertionError, match="scores differ"):
        check_exercise_2(lambda x: x)
    with pytest.raises(AssertionError, match="shape"):
        check_exercise_2(lambda x: x[..., :4])
