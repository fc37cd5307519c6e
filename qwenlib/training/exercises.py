"""Checks of chapter 06's exercises."""

import math
from collections.abc import Callable

from qwenlib.model import QwenConfig
from qwenlib.model.accounting import flops_per_token


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


def check_exercise_2(weights: Callable) -> None:
    """Check `weights(counts) -> list`: what the mean losses of micro-batches are multiplied by.

    Their sum must then have the gradient of one batch with all the tokens.
    """
    if weights([1, 1]) is None:
        print("Exercise 2: not solved yet.")
        return
    for counts in ([4, 4], [1, 3], [10, 0, 2, 8]):
        got = list(weights(counts))
        expected = [count / sum(counts) for count in counts]
        even = [1 / len(counts)] * len(counts)
        assert len(got) == len(counts), f"{len(counts)} micro-batches need as many weights"
        assert got == expected or got != even, (
            f"counts {counts}: equal weights make a token of a short micro-batch count more"
        )
        assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(got, expected)), (
            f"weights({counts}) gave {got}; the sum of all losses is divided by all tokens once"
        )
    print("Exercise 2: right.")


def check_exercise_3(utilisation: Callable) -> None:
    """Check `utilisation(config, length, tokens_per_second, peak) -> float`, the MFU as a share."""
    shape = QwenConfig(1000, 64, 128, 3, 4, 2, 512)
    if utilisation(shape, 256, 1e5, 1e12) is None:
        print("Exercise 3: not solved yet.")
        return
    for length, speed, peak in ((256, 1e5, 1e12), (2048, 3e4, 2e11), (16, 1.0, 1e6)):
        got = utilisation(shape, length, speed, peak)
        expected = speed * flops_per_token(shape, length, training=True) / peak
        forward = speed * flops_per_token(shape, length) / peak
        assert not math.isclose(got, forward, rel_tol=1e-6), (
            "that is the forward pass alone; the backward pass takes twice as much again"
        )
        assert math.isclose(got, expected, rel_tol=1e-6), (
            f"at {speed:g} tokens/s and rows of {length} it should be {expected:.6g}, got {got}; "
            "does your attention grow with the length?"
        )
    print("Exercise 3: right.")


def check_exercise_4(spikes: Callable) -> None:
    """Check `spikes(losses, factor) -> list` of the steps (from 0) to skip.

    A loss above factor times the median of the losses kept so far is skipped, and not kept. The
    first three are always kept.
    """
    if spikes([1.0, 1.0, 1.0, 9.0], 3.0) is None:
        print("Exercise 4: not solved yet.")
        return
    cases = (
        ([1.0, 1.0, 1.0, 9.0, 1.0], 3.0, [3], "the fourth loss is nine times the others"),
        ([9.0, 1.0, 1.0, 2.0], 3.0, [], "the first three are kept, whatever they are"),
        ([1.0] * 3 + [8.0] * 9, 3.0, list(range(3, 12)), "a skipped loss stays out of the median"),
        ([1.0, 1.0, 1.0, 3.0], 3.0, [], "exactly factor times the median is not above it"),
    )  # fmt: skip
    for losses, factor, expected, hint in cases:
        got = list(spikes(losses, factor))
        assert got == expected, f"spikes({losses}, {factor}) gave {got}, not {expected}: {hint}"
    print("Exercise 4: right.")
