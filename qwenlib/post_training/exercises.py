"""Checks of the exercises in chapters 08, 10 and 11."""

import math
import random
from collections.abc import Callable


def check_exercise_sft(token_mean: Callable) -> None:
    """Check `token_mean(means, counts) -> float`; a stub that returns None is not judged."""
    if token_mean([1.0], [1]) is None:
        print("Exercise 1: not solved yet.")
        return
    for means, counts in (([2.0, 1.0, 0.5], [3, 1, 8]), ([1.0, 3.0], [10, 10]), ([0.7], [4])):
        expected = sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
        got = token_mean(means, counts)
        assert math.isclose(got, expected, rel_tol=1e-9), (
            f"token_mean({means}, {counts}) gave {got}; add up the rows' total losses and "
            "divide once by all targets"
        )
    print("Exercise 1: right.")


def check_exercise_dpo(dpo_gradient: Callable) -> None:
    """Check `dpo_gradient(margin, beta) -> float` against a finite difference of the loss."""
    if dpo_gradient(0.0, 0.1) is None:
        print("Exercise 1: not solved yet.")
        return

    def loss(margin: float, beta: float) -> float:
        return math.log1p(math.exp(-beta * margin))

    for margin, beta in ((0.0, 0.1), (2.0, 0.5), (-3.0, 0.2), (10.0, 1.0)):
        step = 1e-5
        expected = (loss(margin + step, beta) - loss(margin - step, beta)) / (2 * step)
        got = dpo_gradient(margin, beta)
        assert math.isclose(got, expected, rel_tol=1e-4, abs_tol=1e-9), (
            f"at margin {margin} and beta {beta} the slope is {expected:.6f}, not {got:.6f}; "
            "differentiate -log sigmoid(beta * margin)"
        )
    print("Exercise 1: right.")


def check_exercise_grpo(pass_at_k: Callable) -> None:
    """Check `pass_at_k(n, c, k) -> float` against drawing k of n answers without replacement."""
    if pass_at_k(4, 2, 1) is None:
        print("Exercise 1: not solved yet.")
        return
    rng = random.Random(0)
    for n, c, k in ((4, 2, 1), (8, 1, 4), (8, 0, 3), (8, 7, 2), (8, 8, 8)):
        hits = [any(i < c for i in rng.sample(range(n), k)) for _ in range(20_000)]
        simulated = sum(hits) / len(hits)
        got = pass_at_k(n, c, k)
        assert abs(got - simulated) < 0.02, (
            f"with {c} of {n} answers right, {k} draws find one in {simulated:.3f} of the cases, "
            f"not {got:.3f}; count the ways to draw only wrong ones"
        )
    print("Exercise 1: right.")
