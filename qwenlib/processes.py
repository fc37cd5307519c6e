"""Worker processes: how they start, and that they end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import BaseContext
from pathlib import Path

WORKER_ENDED = (
    "a worker process ended: for want of memory use fewer workers{}; "
    'a script that starts workers needs `if __name__ == "__main__":`'
)


def process_context() -> BaseContext:
    """Fork, which starts at once, only where no other thread can hold a lock at that moment."""
    tasks = Path("/proc/self/task")
    alone = tasks.is_dir() and len(list(tasks.iterdir())) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


def prepare_worker() -> None:
    """Ctrl-C is the parent's affair; when it is killed, its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
