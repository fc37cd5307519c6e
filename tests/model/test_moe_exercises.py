"""The checks of chapter 03's exercises accept the right answer, refuse others, know the stub."""

import pytest
import torch

from qwenlib.model.moe_exercises import check_exercise_1, check_exercise_2, check_exercise_3


def sizes(hidden, experts, chosen, width, shared_width, gates=1, matrices=3):
    always = matrices * hidden * shared_width + gates * (experts + 1) * hidden
    return tuple(always + n * matrices * hidden * width for n in (experts, chosen))


def test_exercise_1():
    assert check_exercise_1(sizes)
    assert not check_exercise_1(lambda *_: None)
    with pytest.raises(AssertionError, match="router has"):
        check_exercise_1(lambda *a: sizes(*a, gates=0))
    with pytest.raises(AssertionError, match="three matrices"):
        check_exercise_1(lambda *a: sizes(*a, matrices=2))


def route(logits, top_k):
    return logits.float().softmax(-1).topk(top_k)


def renormalised(logits, top_k):
    gates, experts = route(logits, top_k)
    return gates / gates.sum(-1, keepdim=True), experts


def in_their_dtype(logits, top_k):
    return logits.softmax(-1).topk(top_k)


def smallest_first(logits, top_k):
    return tuple(part.flip(1) for part in route(logits, top_k))


def mismatched(logits, top_k):
    gates, experts = route(logits, top_k)
    return gates, experts.flip(1)


def test_exercise_2():
    assert check_exercise_2(route)
    assert not check_exercise_2(lambda *_: NotImplemented)
    for wrong, hint in (
        (renormalised, "sum to one"),
        (in_their_dtype, "fp32"),
        (smallest_first, "largest gate comes first"),
        (mismatched, "do not match"),
        (lambda logits, top_k: route(logits, top_k - 1), "N, C"),
    ):
        with pytest.raises(AssertionError, match=hint):
            check_exercise_2(wrong)


def balance(logits, top_k, mask, count=1.0, masked=True, attached=True):
    p = logits.softmax(-1)
    p = p[mask.bool()] if masked else p
    chosen = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, count)
    mean = p.mean(0) if attached else p.mean(0).detach()
    return p.shape[1] * (chosen.mean(0) * mean).sum()


def test_exercise_3():
    assert check_exercise_3(balance)
    assert not check_exercise_3(lambda *_: None)
    for changes, hint in (
        ({"masked": False}, "mask is 0"),
        ({"count": 0.5}, "sums to top_k"),
        ({"count": 0.7}, "want"),
        ({"attached": False}, "no gradient"),
    ):
        with pytest.raises(AssertionError, match=hint):
            check_exercise_3(lambda *a, changes=changes: balance(*a, **changes))
