"""One function on several processes: from a notebook or a script, under torchrun, or under Slurm.

def work(steps):
    model = shard(Qwen(shape).initialise(0))
    return train(model, by_rank(batches), next_token_loss, TrainConfig(steps, 1e-3)).history

history = launch(work, 100, nproc=2)  # two processes; `torchrun --nproc-per-node=2 script.py`
                                      # and `srun --ntasks=2 python script.py` need no change
"""

import codecs
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from qwenlib.training.preemption import EXIT_CODE, Preempted

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
NOISY = ("torch.distributed", "torch.multiprocessing")  # loggers


class RankFailed(RuntimeError):
    """A process of `launch` failed; the text has its traceback."""


def launch(
    fn: Callable[..., Any], *args: Any, nproc: int = 0, device: str = "auto",
    log_dir: str | Path | None = None, show: bool = True,
) -> Any:  # fmt: skip
    """fn(*args) on every process of a group, joined by NCCL (GPUs) or gloo; rank 0's return value.

    A process that torchrun or a `srun` of several tasks started is a rank of theirs: it joins the
    group, calls fn, and gets its own value; nproc, log_dir and show have no meaning. Any other
    process (a notebook's kernel) starts `nproc` new ones by torch's elastic launcher and waits.
    What fn, its globals and args hold goes there by value, cells of a notebook included. Signals
    are passed on, so that `train` can save; processes still there 30 s later are killed.

    Args:
        nproc: processes; 0: one for each GPU, one without.
        device: "cpu", "cuda" or "auto" (a GPU where there is one). With "cuda" each rank's current
            device is its own GPU; on a CPU the ranks share out the threads.
        log_dir: keeps what each rank printed, in */attempt_0/RANK/stdout.log and stderr.log; None:
            rank 0's is shown (`show`), the others' is lost.
    Raises RankFailed with the traceback of the rank that failed first, Preempted when `train` left
    because of a signal, and ValueError or TypeError for what cannot be started.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dist.is_available() and dist.is_initialized():
        return fn(*args)
    os.environ.update(slurm_ranks(os.environ))
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return _in_group(fn, args, device)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    nproc = nproc or max(gpus, 1)
    if nproc < 1 or (device == "cuda" and nproc > gpus):
        raise ValueError(
            f"{nproc} processes cannot be started on {device}"
            + (f": there are {gpus} GPUs (device='cpu' takes any number)" if nproc > 0 else "")
        )
    return _start(_by_value(fn, args), nproc, device, log_dir, show)


def slurm_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for one of several tasks of a Slurm step; {} anywhere else.

    MASTER_ADDR and MASTER_PORT that are set already stay; else they are the step's first node and a
    number made of job and step, the same for all tasks.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "RANK" in environ:
        return {}
    here: list[str] = []  # tasks of each node, from "2(x3),1"
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"]):
        here += [count] * int(times or 1)
    number = 97 * int(environ["SLURM_JOB_ID"]) + int(environ.get("SLURM_STEP_ID", 0))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": here[int(environ["SLURM_NODEID"])],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_node(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(15_000 + number % 15_000),
    }


def _first_node(nodes: str) -> str:
    if not set(nodes) & set("[,"):
        return nodes
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def _in_group(fn: Callable[..., Any], args: tuple, device: str) -> Any:
    """fn(*args) as the rank that torchrun's variables name; the group is left behind on an error,
    because others may never come to meet us again."""
    local, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    # Nobody goes on before all are connected: a rank with little to do would be gone while another
    # still waits for its answer, and that one fails with "connection closed by peer".
    dist.all_reduce(torch.zeros(1))
    value = fn(*args)
    dist.destroy_process_group()
    return value


def _by_value(fn: Callable[..., Any], args: tuple) -> bytes:
    try:
        return cloudpickle.dumps((fn, args))
    except (TypeError, pickle.PicklingError) as error:
        raise TypeError(
            f"{getattr(fn, '__name__', fn)} cannot be sent to other processes: {error}; make what "
            "it uses inside the function, or give it as plain values"
        ) from error


def _start(work: bytes, nproc: int, device: str, log_dir, show: bool) -> Any:
    # Here, because they take a second to import and a single process never needs them.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with ExitStack() as stack:
        notes = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwenlib_ranks_")))
        logs = Path(log_dir) if log_dir else notes / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        run = uuid.uuid4().hex
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=run, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
            signals_to_handle=",".join(SIGNALS),
        )  # fmt: skip
        number, codes = 0, {}
        with _own_handlers(), _quiet(), _shown(logs, f"{run}_*/attempt_0/0/", show):
            try:
                elastic_launch(config, _rank)(work, str(notes), device)
            except SignalException as error:
                number = error.sigval
            except ChildFailedError as error:
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        outcomes = {
            rank: pickle.loads(file.read_bytes())
            for rank in range(nproc)
            if (file := notes / f"rank{rank}").exists()
        }
    for kind, what in outcomes.values():
        if kind == "preempted":
            raise Preempted(*what)  # what `train` did counts, not who was told to leave
    if number:
        signal.raise_signal(number)  # a KeyboardInterrupt, or the end of this process
        raise RankFailed(f"stopped by {signal.Signals(number).name}")
    if codes:
        raise RankFailed(_what_failed(outcomes, codes, nproc))
    return cloudpickle.loads(outcomes[0][1])


def _rank(work: bytes, notes: str, device: str) -> None:
    """A process that `_start` started; how it ended goes to a file, which no signal can lose."""
    sys.stdout.reconfigure(line_buffering=True)
    rank, status = int(os.environ["RANK"]), 0
    try:
        fn, args = cloudpickle.loads(work)
        value = _in_group(fn, args, device)
        outcome = "value", cloudpickle.dumps(value) if rank == 0 else None
    except Preempted as left:
        outcome, status = ("preempted", (left.name, left.step, left.saved)), left.code
    except Exception as error:
        lines = traceback.format_exception(error.with_traceback(_of_fn(error.__traceback__)))
        last = traceback.format_exception_only(error)[-1].strip()
        outcome, status = ("failed", (time.monotonic(), last, "".join(lines))), 1
    partial = Path(notes) / f".rank{rank}"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(notes) / f"rank{rank}")
    if status == EXIT_CODE:  # ranks leave together, and the first to end has the others ended
        _wait_for([Path(notes) / f"rank{other}" for other in range(int(os.environ["WORLD_SIZE"]))])
    if status:
        sys.exit(status)  # silently: the launcher tells what went wrong


def _wait_for(files: Sequence[Path], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(file.exists() for file in files):
        time.sleep(0.01)


def _of_fn(frames):
    """The traceback without our own frames above fn's."""
    inner = frames
    while inner and inner.tb_frame.f_code.co_filename == __file__:
        inner = inner.tb_next
    return inner or frames


def _what_failed(outcomes: dict, codes: dict[int, int], nproc: int) -> str:
    """The first failure in full, and a line for each that came after it."""
    failed = {rank: what for rank, (kind, what) in outcomes.items() if kind == "failed"}
    killed = {rank: code for rank, code in codes.items() if rank not in failed}
    if killed:  # before it could say why; what others say comes of it
        first, code = next(iter(killed.items()))
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        text = f"rank {first} of {nproc} {how}{memory}"
    else:
        first = min(failed, key=lambda rank: failed[rank][0])
        _, last, full = failed[first]
        text = f"rank {first} of {nproc} failed: {last}\n\n{full.rstrip()}"
    others = [f"\nafter it rank {r}: {what[1]}" for r, what in failed.items() if r != first]
    return text + "".join(others)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """What the launcher does to signal handlers, and leaves so, is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the launcher's own log, which says over and over what RankFailed says once."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(NOISY)]
    ours = [logging.getLogger(name) for name in names]
    levels = [log.level for log in ours]
    for log in ours:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(ours, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _shown(logs: Path, rank: str, show: bool) -> Iterator[None]:
    """What a rank prints is printed here as it comes; carriage returns of bars stay."""
    if not show:
        yield
        return
    finished = threading.Event()
    copies = (
        threading.Thread(target=_copy, args=(logs, f"{rank}{name}.log", stream, finished))
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr))
    )
    threads = list(copies)
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        finished.set()
        for thread in threads:
            thread.join()


def _copy(logs: Path, pattern: str, stream, finished: threading.Event) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    done, end = 0, False
    while not end:
        end = finished.wait(0.2)  # and once more after that
        for file in logs.glob(pattern):
            with file.open("rb") as opened:
                opened.seek(done)
                new = opened.read()
            done += len(new)
            stream.write(decoder.decode(new))
            stream.flush()
