"""Leaving in good order: a signal asks, the loop finishes its step, saves and raises Preempted.

Batch systems send SIGTERM some time before they take the machine away, and Slurm any other signal
that a job asks for (`#SBATCH --signal=B:USR1@120`). A script that does not catch `Preempted` ends
with exit code 75, sysexits.h's "temporary failure, try again": the same command goes on.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from qwenlib.training.distributed import world_size

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The loop left after `step` steps, at the request of `name`; `saved` says whether in vain."""

    def __init__(self, name: str, step: int, saved: bool):
        super().__init__(EXIT_CODE)
        self.name, self.step, self.saved = name, step, saved

    def __reduce__(self):
        return Preempted, (self.name, self.step, self.saved)  # from a worker process to its pool

    def __str__(self) -> str:
        state = "the state is saved, run again to go on" if self.saved else "no state was asked for"
        return f"{self.name}: stopped after step {self.step}; {state}"


class Preemption:
    """Context in which SIGTERM and SIGUSR1 only leave a note, which `requested` reads.

    Outside the main thread, where Python sets no handlers, signals keep their effect.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device  # one that the process group's backend serves
        self.number = 0  # of the signal; 0: none came
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        try:
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def requested(self) -> bool:
        """Whether a signal came, to any rank: all of them get the same answer.

        In a process group this is a collective operation, to be called by all ranks once a step.
        Signals reach the ranks at different moments; each deciding alone, they would save
        different steps, or wait for one that has left.
        """
        if world_size() > 1:
            number = torch.tensor(self.number, device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
        return self.number != 0

    def leave(self, step: int, saved: bool) -> None:
        """Raise Preempted."""
        raise Preempted(signal.Signals(self.number).name, step, saved)
