"""The process that the kernels of a run are forked from: it imports what every chapter imports.

The runner starts it as `python -m qwenlib.batch.kernel_parent MODULE ...` with a socket as its
standard input, sends one JSON line for each kernel (`argv`, `env`, `cwd`) and reads one line back
(`pid`). It ends when the runner's end of the socket closes, and its kernels end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# Batch systems send these to every process of a job; this one ends with its runner.
LEAVE = (signal.SIGTERM, signal.SIGUSR1)


def main(modules: Sequence[str]) -> None:
    """Import the modules, then fork a kernel for each request; only the kernels return."""
    # Its end would take kernels along that still have a step to save. Blocked, not ignored: what
    # comes for a new kernel waits until that is ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE)
    if sys.path and Path(sys.path[0] or ".") == Path.cwd():
        del sys.path[0]  # a file of the working folder must not stand in for a package
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # read when ipykernel is imported
    atexit.register(_leave)  # first in, so the last to run
    for name in modules:
        # The cell that imports a broken package shows what is wrong with it.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # keeps the kernels' collector from copying the pages they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system clears ended kernels away
    parent, channel = os.getpid(), socket.socket(fileno=os.dup(0))
    with channel, channel.makefile("rw") as lines:
        request = _serve(lines)
    if request is None:
        os._exit(0)
    _become_kernel(parent, request)


def _serve(lines: TextIO) -> dict[str, Any] | None:
    """Fork a kernel for each request: returns it in the kernel, and None here after the last."""
    with contextlib.suppress(ConnectionError):
        for line in lines:
            pid = _fork()
            if pid == 0:
                return json.loads(line)
            lines.write(json.dumps({"pid": pid}) + "\n")
            lines.flush()
    return None


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread; those of OpenBLAS and jemalloc are prepared for forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become_kernel(parent: int, request: Mapping[str, Any]) -> None:
    """Leave this process as `python -m ipykernel_launcher` would find it, then run the kernel."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEAVE)
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(request["env"], JPY_PARENT_PID=str(parent))
    os.chdir(request["cwd"])
    sys.argv = ["ipykernel_launcher", *request["argv"]]
    # The notebook reads the library as it stands now, not as it stood when the run began.
    for name in [name for name in sys.modules if name.partition(".")[0] == "qwenlib"]:
        del sys.modules[name]
    from qwenlib.notebook import die_with_parent

    die_with_parent(parent)
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()


def _leave() -> None:
    """End without taking every module down, which costs a second or two and frees nothing more."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
