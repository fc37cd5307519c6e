"""Checks of chapter 06's exercises."""

import math
from collections.abc import Callable


def check_exercise_1(perplexity: Callable) -> None:
    """Check `perplexity(loss, tokens, units) -> float`; a stub that returns None is not judged."""
    if perplexity(1.0, 10, 5) is None:
        print("Exercise 1: not solved yet.")
        return
    for loss, tokens, units in ((math.log(2), 10, 10), (1.5, 30, 20), (2.0, 7, 14)):
        expected = math.exp(loss * tokens / units)
        got = perplexity(loss, tokens, units)
        assert math.isclose(got, expected, rel_tol=1e-9), (
            f"perplexity({loss:.4g}, {tokens}, {units}) gave {got}; the text's total loss is "
            "loss * tokens nats, to be shared by its units"
        )
    print("Exercise 1: right.")
