"""Learning-rate schedules as pure functions of the step."""

import math

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def learning_rate_at(
    step: int, max_steps: int, peak: float, warmup_steps: int, schedule: str, min_ratio: float,
    decay_share: float = 0.2,
) -> float:  # fmt: skip
    """Learning rate of optimiser step `step` (0-based); linear warm-up, then the named shape.

    Every shape but constant ends at peak * min_ratio; wsd (warm-up, stable, decay) keeps the peak
    until the last `decay_share` of the steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
    progress = min(progress, 1.0)
    if schedule == "cosine":
        scale = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        scale = 1 - progress
    elif schedule == "wsd":
        scale = min(1.0, (1 - progress) / decay_share)
    elif schedule == "constant":
        return peak
    else:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    return peak * (min_ratio + (1 - min_ratio) * scale)
