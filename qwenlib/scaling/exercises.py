"""Checkers of the exercises in chapter 05; they accept any correct answer."""

from collections.abc import Callable

import numpy as np

from qwenlib.scaling.fit import huber
from qwenlib.scaling.forms import CHINCHILLA_PUBLISHED, CHINCHILLA_REFIT


def check_exercise_1(answer: Callable) -> None:
    """Check `answer(r, delta) -> psi`, the derivative of the Huber loss; hints on failure."""
    r, delta = np.array([-3e-2, -1e-3, -4e-4, 0.0, 4e-4, 1e-3, 3e-2]), 1e-3
    if answer(r, delta) is None:
        print("Exercise 1: not solved yet.")
        return
    got = np.asarray(answer(r, delta), float)
    assert got.shape == r.shape, f"shape {got.shape}, expected one value a residual, {r.shape}"
    inside = np.abs(r) < delta
    assert np.allclose(got[inside], r[inside]), "inside |r| < delta the loss is r^2/2"
    assert np.allclose(np.abs(got), np.minimum(np.abs(r), delta)), (
        "outside, the slope stays at delta: one bad run pulls no harder than a mediocre one"
    )
    for width in (1e-3, 0.3):
        x, h = np.linspace(-1, 1, 41) + 1e-4, 1e-6
        numeric = (huber(x + h, width) - huber(x - h, width)) / (2 * h)
        assert np.allclose(answer(x, width), numeric, atol=1e-6), (
            f"delta = {width}: differs from the numerical derivative; mind the sign of r"
        )


def check_exercise_2(answer: Callable) -> None:
    """Check `answer(law, C) -> (N, D)`, the compute-optimal split of C = 6 N D FLOPs."""
    if answer(CHINCHILLA_REFIT, 1e21) is None:
        print("Exercise 2: not solved yet.")
        return
    for law in (CHINCHILLA_REFIT, CHINCHILLA_PUBLISHED):
        for C in (1e18, 5.76e23):
            N, D = answer(law, C)
            assert np.isclose(6 * N * D, C, rtol=1e-6), (
                f"6 N D = {6 * N * D:.3g}, but the budget is {C:.3g}: D follows from N"
            )
            best = law.loss(N, D)
            for shift in (0.98, 1.02):
                near = law.loss(N * shift, D / shift)
                assert best <= near, (
                    f"at C = {C:.3g} a model {shift:.0%} of yours, on the same budget, is better "
                    f"({near:.6f} against {best:.6f}): set dL/dN = 0 along D = C / 6N"
                )
