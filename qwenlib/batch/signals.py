"""What a batch system asks of a run: to leave in good order, and to stand in the queue again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping

from qwenlib.batch.kernels import KernelParent
from qwenlib.batch.params import EnvironmentProblem

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # sysexits.h: a temporary failure, the same command goes on
GRACE = 25.0  # seconds; Slurm leaves 30 between SIGTERM and SIGKILL (KillWait)


class Notice:
    """Context in which SIGTERM and SIGUSR1 are passed on to the kernel.

    A stage that is training saves its step and leaves; any other ends by the signal. A kernel that
    is still there after `grace` seconds is killed. Outside the main thread, where Python sets no
    handlers, signals keep their effect.
    """

    def __init__(self, parent: KernelParent, grace: float = GRACE):
        if not grace > 0:
            raise ValueError(f"grace must be more than 0 seconds, got {grace}")
        self.parent, self.grace = parent, grace
        self.number = 0  # of the signal; 0: none came
        self.over = False  # the time is
        self._old: dict[int, object] = {}

    def __enter__(self) -> Notice:
        handlers = dict.fromkeys(SIGNALS, self._pass_on) | {signal.SIGALRM: self._end}
        with contextlib.suppress(ValueError):  # not in the main thread
            for number, handler in handlers.items():
                self._old[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error: object) -> None:
        if self._old:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        if not self.number:
            signal.setitimer(signal.ITIMER_REAL, self.grace)
        self.number = number
        self.parent.stop(number)

    def _end(self, number: int, frame: object) -> None:
        self.over = True
        self.parent.stop(signal.SIGKILL)

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.over:
            return f"{name}: the stage did not leave within {self.grace:g} s and was ended"
        return f"{name}: the stage was not training and was ended"


def slurm_job(environ: Mapping[str, str] = os.environ) -> str:
    """Id of the Slurm job that this process is part of; raises EnvironmentProblem without one."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        raise EnvironmentProblem("--requeue is for Slurm jobs, and SLURM_JOB_ID is not set")
    return job


def requeue(job: str) -> str:
    """Let Slurm end this job and queue it again; returns what is wrong, or nothing."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} is not queued again: {error}"
    if done.returncode:
        return f"job {job} is not queued again: {(done.stderr or done.stdout).strip()}"
    return ""
