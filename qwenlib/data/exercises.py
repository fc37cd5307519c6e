"""Checkers of the exercises in chapter 04; they accept any correct answer."""

import random
from collections.abc import Callable, Sequence

from qwenlib.data.decontamination import lcs_length
from qwenlib.data.dedup import catch_probability


def check_exercise_1(answer: Callable[[Sequence, Sequence], int | None]) -> None:
    """Check `answer(a, b) -> length` of the longest common subsequence; hints on failure."""
    if answer("ab", "b") is None:
        print("Exercise 1: not solved yet.")
        return
    by_hand = [
        ("", "abc", 0, "an empty sequence shares nothing"),
        ("abc", "abc", 3, "equal sequences share everything"),
        ("abc", "acb", 2, "order counts, but tokens may be skipped"),
        ("abcd", "xbyd", 2, "skipping is free in both sequences"),
        ("aab", "ab", 2, "a token is used once"),
        ("ab", "ba", 1, "crossing matches cannot both count"),
    ]
    for a, b, expected, hint in by_hand:
        got = answer(a, b)
        assert got == expected, f"LCS({a!r}, {b!r}) = {got}, expected {expected}: {hint}"
    rng = random.Random(0)
    for _ in range(100):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(12))] for _ in range(2))
        got, expected = answer(a, b), lcs_length(a, b)
        assert got == expected, f"LCS({a}, {b}) = {got}, expected {expected}"
    print("Exercise 1: correct.")


def check_exercise_2(answer: Callable[[], tuple[int, int] | None]) -> None:
    """Check `answer() -> (bands, rows)`: at most 128 hashes, 95 % at s = 0.8, 5 % at s = 0.4."""
    chosen = answer()
    if chosen is None:
        print("Exercise 2: not solved yet.")
        return
    bands, rows = chosen
    assert bands >= 1 and rows >= 1, f"{bands} bands of {rows} rows: both are at least 1"
    assert bands * rows <= 128, f"{bands} × {rows} = {bands * rows} hashes, at most 128 are allowed"
    near, far = (float(catch_probability(s, bands, rows)) for s in (0.8, 0.4))
    assert near >= 0.95, f"a pair at s = 0.8 is proposed with {near:.3f}, wanted 0.95: more bands"
    assert far <= 0.05, f"a pair at s = 0.4 is proposed with {far:.3f}, wanted 0.05: more rows"
    print("Exercise 2: correct.")
