"""The settings of a training run."""

import dataclasses
import difflib
import math
from dataclasses import dataclass

import torch

from qwenlib.machine import fast_bfloat16
from qwenlib.training.schedule import SCHEDULES

# May differ when a run is taken up again: they change what is kept or how fast it goes. (workers
# and compile change the rounding, as the number of threads does.)
_FREE = ("workers", "compile", "activation_checkpointing", "save_every", "keep_every",
         "on_bad_step")  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Steps are optimiser steps; shares are of max_steps.

    Raises ValueError for a value that cannot work, naming the setting.
    """

    max_steps: int
    learning_rate: float
    min_lr_ratio: float = 0.1
    warmup_share: float = 0.1
    schedule: str = "cosine"
    decay_share: float = 0.2  # of wsd: the last part, where the rate falls
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0
    eval_every: int = 0  # 0: only at the end
    save_every: int = 0  # 0: no resume state
    keep_every: int = 0  # every n-th saved state stays for good; 0: only the newest
    autocast: str = "none"  # none | bfloat16 over fp32 weights | auto: bf16 where it is fast
    workers: int = 0  # micro-batches at once on a CPU (see `Gradients`); 0: as many as threads
    activation_checkpointing: str = "none"  # none | full: blocks run again in the backward pass
    compile: bool = False  # torch.compile, block by block
    ema_decay: float = 0.0  # of a moving average of the weights, say 0.999; 0: none
    on_bad_step: str = "stop"  # not finite, or a spike: stop | skip it (see `bad_steps`)
    spike_factor: float = 0.0  # loss or norm above so many medians is a spike; 0: nothing is

    def __post_init__(self) -> None:
        for name in (
            "eval_every",
            "save_every",
            "keep_every",
            "workers",
            "weight_decay",
            "grad_clip",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("min_lr_ratio", "warmup_share"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._require("max_steps", self.max_steps >= 1, "at least 1")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "positive")
        self._require("decay_share", 0 < self.decay_share <= 1, "above 0 and at most 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0 (off) or between 0 and 1")
        spike = self.spike_factor == 0 or self.spike_factor > 1
        self._require("spike_factor", spike, "0 (off) or above 1, say 3")
        self._choose("schedule", SCHEDULES)
        self._choose("autocast", ("none", "bfloat16", "auto"))
        self._choose("activation_checkpointing", ("none", "full"))
        self._choose("on_bad_step", ("stop", "skip"))

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)}")

    def _choose(self, name: str, values: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in values:
            near = difflib.get_close_matches(str(value), values, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {name} {value!r}, choose one of {', '.join(values)}{hint}")

    def resolved(self, device: torch.device) -> "TrainConfig":
        """These settings with autocast "auto" decided for the device."""
        return dataclasses.replace(self, autocast=compute_dtype(self.autocast, device))

    def differences(self, saved: dict) -> list[str]:
        """Names of the settings that make another run than `saved` (a dict of them) was.

        A setting that the saved run did not know yet had today's default.
        """
        now = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return sorted(
            name for name in now.keys() - set(_FREE) if now[name] != saved.get(name, defaults[name])
        )


def compute_dtype(autocast: str, device: torch.device) -> str:
    """The setting `autocast` with "auto" decided: "bfloat16" where its products are fast."""
    if autocast != "auto":
        return autocast
    return "bfloat16" if fast_bfloat16(device) else "none"
