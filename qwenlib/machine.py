"""What a machine can run: its speed, its memory, and the estimates that follow from them.

Symbols: N parameters, D training tokens, F floating-point operations a second, W bytes a second.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Adam in fp32, or bf16 with an fp32 master copy: both hold 16 bytes a parameter
# (arXiv 1910.02054, section 3.1: weights, gradients, master weights and two moments).
TRAINING_BYTES = 16
BF16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Machine:
    """Processor, cores this process may use, memory in bytes, and the GPU if there is one."""

    processor: str
    cores: int
    memory: int
    gpu: str | None
    gpu_memory: int

    @property
    def best_memory(self) -> int:
        """Bytes where a model would live: the GPU's memory, else the machine's."""
        return self.gpu_memory or self.memory


def describe() -> Machine:
    """Look at the machine this runs on."""
    import torch

    gpu, gpu_memory = None, 0
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        gpu_memory = torch.cuda.get_device_properties(0).total_memory
    return Machine(_processor(), cores(), _memory(), gpu, gpu_memory)


def cores() -> int:
    """CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fast_bfloat16(device: Any) -> bool:
    """Whether bf16 products are faster than fp32 ones there, by the hardware's own instructions.

    On a CPU that means AVX512-BF16 or AMX; without them bf16 is emulated and slower than fp32.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _memory() -> int:
    """Bytes of memory, or of the container's limit when that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def peak_memory_mb(device: Any) -> float:
    """Highest memory of this process so far in MB: GPU memory on cuda, else resident memory."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def median_seconds(action: Callable[[], Any], repeats: int, device: Any) -> float:
    """Median time of `action` in seconds, after one warm-up; waits for the GPU."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matmul_speed(size: int, repeats: int, device: Any, dtype: Any) -> float:
    """F: floating-point operations a second of a (size, size) by (size, size) product."""
    import torch

    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return matmul_flops(size) / median_seconds(lambda: a @ b, repeats, device)


def matmul_flops(size: int) -> int:
    """Operations of a square matrix product: one multiplication and one addition per term."""
    return 2 * size**3


def copy_speed(megabytes: int, repeats: int, device: Any) -> float:
    """W: bytes a second that memory moves, reads and writes counted, in a large copy."""
    import torch

    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), repeats, device)
    return 2 * source.numel() / seconds


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6 N D: 2 N for the forward pass of a token, 4 N for the backward (arXiv 2001.08361)."""
    return 6 * parameters * tokens


def training_memory(parameters: float) -> float:
    """Bytes of weights, gradients and Adam state; activations come on top."""
    return TRAINING_BYTES * parameters


def decode_speed(parameters: float, bandwidth: float) -> float:
    """Most tokens a second for one sequence: every bf16 weight is read once per token."""
    return bandwidth / (BF16_BYTES * parameters)


def check_exercise_1(training_days: Callable[[float, float, float], float | None]) -> None:
    """Test a reader's `training_days(parameters, tokens, speed)`; raises with a hint."""
    got = training_days(1e9, 20e9, 1e14)
    if got is None:
        print("exercise 1: not solved yet")
        return
    want = training_flops(1e9, 20e9) / 1e14 / 86_400
    ratio = got / want
    hints = {
        1 / 3: "you counted the forward pass only; the backward pass costs twice as much again",
        2 / 3: "a backward pass costs two forward passes, not one",
        24: "that is hours; a day has 24 of them",
        86_400: "that is seconds; a day has 86,400 of them",
    }
    for factor, hint in hints.items():
        assert abs(ratio / factor - 1) > 0.02, hint
    assert abs(ratio - 1) < 0.02, f"expected {want:.4g} days for N=1e9, D=2e10, F=1e14; got {got}"
    # The answer must follow all three arguments.
    for arguments in ((2e9, 20e9, 1e14), (1e9, 5e9, 1e14), (1e9, 20e9, 3e14)):
        want = training_flops(*arguments[:2]) / arguments[2] / 86_400
        got = training_days(*arguments)
        assert abs(got / want - 1) < 0.02, (
            f"training_days{arguments} should be {want:.4g}, got {got}"
        )
    print("exercise 1: correct")
