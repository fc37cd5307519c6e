"""Run the cases of `qwenlib bench` and report rows of rates and ratios."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from qwenlib import machine
from qwenlib.bench.cases import Case, DifferentOutput, SkipCase, Task, refuse
from qwenlib.bench.suite import CASES
from qwenlib.bench.timing import compare, seconds_of
from qwenlib.notebook import seed_everything, versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("generate", "forward", "train", "tokenizer")


class BenchError(ValueError):
    """The request names something that does not exist; the message lists what does."""


@dataclass(frozen=True)
class Report:
    """Rows of measurements and what they were taken with.

    kind: one of KINDS, or "" for cases of several. Each row: name, about, unit ("tokens/s" or
    "MB/s"), ours and peer (median rates), peer_name, ratio (the median of the rounds' own ratios;
    above 1 ours is faster), ratio_low and ratio_high (its 95 % interval), rounds; for single-stream
    decoding bandwidth_fraction, for training ours_mb and peer_mb (peak memory).
    skipped, refused: case -> why; a refused case computes something else than its peer.
    """

    kind: str
    rows: list[dict[str, Any]]
    device: str
    dtype: str
    threads: int
    bandwidth_gb_s: float  # of a large copy, reads and writes counted
    platform: str
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def select(kind: str, name: str = "") -> list[Case]:
    """The cases of a kind whose name contains `name`. Raises BenchError listing those there are."""
    if kind not in KINDS:
        raise BenchError(f"there is no bench {kind!r}; there are: {', '.join(KINDS)}")
    known = [case for case in CASES if case.kind == kind]
    found = [case for case in known if name in case.name]
    if not found:
        names = ", ".join(case.name for case in known)
        raise BenchError(f"no case of {kind!r} has {name!r} in its name; there are: {names}")
    return found


def run(
    cases: list[Case], *, rounds: int = 9, threads: int | None = None, dtype: str = "float32",
    device: str = "auto", tell: Callable[[str], object] = lambda line: None,
) -> Report:  # fmt: skip
    """Time the cases one after the other; `tell` hears of each. Raises BenchError for bad settings.

    threads: of torch, for both sides; default: every core this process may use.
    """
    if dtype not in DTYPES:
        raise BenchError(f"there is no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if device not in ("auto", "cpu", "cuda"):
        raise BenchError(f"there is no device {device!r}; there are: auto, cpu, cuda")
    if rounds < 1 or (threads is not None and threads < 1):
        raise BenchError(f"rounds and threads must be at least 1, got {rounds} and {threads}")
    before = torch.get_num_threads()
    where = seed_everything(0, device)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        report = Report(
            kind=cases[0].kind if len({case.kind for case in cases}) == 1 else "",
            rows=[],
            device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
            dtype=dtype,
            threads=torch.get_num_threads(),
            bandwidth_gb_s=machine.copy_speed(256, 5, where) / 1e9,
            platform=f"{machine.describe().processor}, {platform.system()}",
            versions={
                "python": platform.python_version(),
                **versions(),
                **_versions("gigatoken", "accelerate"),
            },
        )
        for case in cases:
            tell(f"{case.name}: {case.about}")
            try:
                row = measure(case, where, DTYPES[dtype], rounds, report.bandwidth_gb_s)
            except SkipCase as reason:
                report.skipped[case.name] = str(reason)
                tell(f"  skipped: {reason}")
            except DifferentOutput as reason:
                report.refused[case.name] = str(reason)
                tell(f"  refused, the outputs differ: {reason}")
            else:
                report.rows.append(row)
                tell(f"  {rate(row['ours'])} against {rate(row['peer'])} {row['unit']}: "
                     f"{row['ratio']:.2f}x ({row['peer_name']})")  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return report


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, bandwidth_gb_s: float
) -> dict[str, Any]:
    """One row. Raises DifferentOutput, before anything is timed, when the two sides disagree."""
    with _true_fp32():
        task = case.make(device, dtype, **case.sizes)
        task.prepare()
        expected = task.ours()
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        seconds: dict[str, float] = {}
        for label, peer in task.peers.items():
            task.prepare()
            began = time.perf_counter()
            got = peer()
            wait()
            seconds[label] = time.perf_counter() - began
            refuse(_prefixed(f"{task.library} with {label}", task.difference(expected, got)))
            del got
        del expected
        label = _fastest(task, seconds, wait)
        rounds = min(rounds, case.most_rounds or rounds)
        warmup = 0 if case.most_rounds else 1  # both sides have been called already
        times = compare(
            task.ours, task.peers[label], rounds, warmup=warmup, wait=wait, prepare=task.prepare
        )
    row = {
        "name": case.name,
        "about": case.about,
        "ours": task.amount / times.ours,
        "peer": task.amount / times.peer,
        "peer_name": f"{task.library}, {label}",
        "ratio": times.ratio,
        "unit": task.unit,
        "ratio_low": times.ratio_low,
        "ratio_high": times.ratio_high,
        "rounds": times.rounds,
    }
    if task.step_bytes:
        moved = task.step_bytes * task.steps / times.ours / 1e9
        row["bandwidth_fraction"] = moved / bandwidth_gb_s
    if task.peak_mb:
        row["ours_mb"], row["peer_mb"] = task.peak_mb(None), task.peak_mb(label)
    return row


def _fastest(task: Task, first: dict[str, float], wait: Callable[[], object]) -> str:
    """The peer with the best of two times, of which the first is given."""
    if len(task.peers) == 1:
        return next(iter(task.peers))
    best = {}
    for label, peer in task.peers.items():
        task.prepare()
        best[label] = min(first[label], seconds_of(peer, wait))
    return min(best, key=best.__getitem__)


def rate(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _prefixed(label: str, difference: str) -> str:
    return f"{label}: {difference}" if difference else ""


@contextlib.contextmanager
def _true_fp32() -> Iterator[None]:
    """No TF32 for either side: its rounding would hide a difference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
