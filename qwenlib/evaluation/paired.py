"""Intervals for accuracies, and differences of two models on the same questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (second - first) over questions, and its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


def paired_difference(
    first: Sequence[float], second: Sequence[float], seed: int = 0, draws: int = 4000
) -> PairedDifference:
    """Bootstrap over questions of the difference of two models' scores.

    Resampling questions, not answers, keeps the pairing: a hard question stays hard for both.
    Raises ValueError when the lengths differ or are 0.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"need the same questions for both: {len(first)} and {len(second)} scores")
    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), (draws, len(difference)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return PairedDifference(float(difference.mean()), float(low), float(high))


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion; sensible at 0 and 1, where ±z·σ is not."""
    if not 0 <= hits <= trials or trials == 0:
        raise ValueError(f"need 0 <= hits <= trials and trials > 0, got {hits} of {trials}")
    share = hits / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
