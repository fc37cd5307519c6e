"""Peak memory of a piece of work, taken in a process of its own.

Libraries keep what they have freed and a process remembers only its highest mark, so two sides that
are measured in one process would spoil each other's figure.
"""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh interpreter, with as many threads; both must pickle.

    What it raises is raised here; concurrent.futures.process.BrokenProcessPool when it was killed,
    as the system does with one that takes all memory.
    """
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, torch.set_num_threads, threads) as pool:
        return pool.submit(function, *arguments).result()


def peak_mb(work: Callable[[], object], device: torch.device) -> float:
    """MB (1e6 bytes) at the highest moment of `work`, above what was in use before it.

    On a GPU what its tensors take, else resident memory. Without Linux's /proc the mark cannot be
    put back, and what stayed below an earlier peak counts as nothing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and marks.exists()):
        before = _highest_ever()
        work()
        return (_highest_ever() - before) / 1e6
    marks.write_text("5")  # the highest mark becomes what is in use now
    before = _kilobytes(status, "VmRSS")
    work()
    return (_kilobytes(status, "VmHWM") - before) * 1024 / 1e6


def _kilobytes(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def _highest_ever() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
