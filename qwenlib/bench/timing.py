"""Two callables timed in turn, so that a slow minute of the machine falls on both."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # bootstrap resamples


@dataclass(frozen=True)
class Comparison:
    """Seconds of both sides, and ratio = peer's time / our time (above 1: ours is faster).

    ours, peer: medians over the rounds. ratio: the median of the rounds' own ratios, which is not
    exactly peer / ours. ratio_low, ratio_high: its 95 % interval, from a bootstrap over rounds.
    """

    ours: float
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def compare(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int, *, warmup: int = 1,
    wait: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[], object] = lambda: None,
) -> Comparison:  # fmt: skip
    """Time both once a round, the other first in each next round; warm-up rounds do not count.

    wait: called before each reading of the clock, to let a GPU finish. prepare: called before each
    call, outside of its time. Raises ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    ours_s, peer_s = [], []
    sides = [(ours, ours_s), (peer, peer_s)]
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for action, seconds in sides if i % 2 == 0 else sides[::-1]:
                prepare()
                seconds.append(seconds_of(action, wait, clock))
    finally:
        if was_enabled:
            gc.enable()
    return summarise(ours_s[warmup:], peer_s[warmup:])


def seconds_of(
    action: Callable[[], object], wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """Seconds of one call, the work that it queued on a GPU included."""
    wait()
    began = clock()
    action()
    wait()
    return clock() - began


def summarise(ours_s: list[float], peer_s: list[float]) -> Comparison:
    """Medians, and the median ratio of the paired rounds with its interval; seeded."""
    ratios = np.array(peer_s) / np.array(ours_s)
    picks = np.random.default_rng(0).integers(len(ratios), size=(DRAWS, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
    return Comparison(
        ours=statistics.median(ours_s),
        peer=statistics.median(peer_s),
        ratio=float(np.median(ratios)),
        ratio_low=float(low),
        ratio_high=float(high),
        rounds=len(ratios),
    )
