"""Kernels of a run, forked from one process that has done their slow imports.

A kernel spends some five seconds on importing torch, pandas and matplotlib and another one or two
on taking them down. Here `kernel_parent` imports them once a run and each kernel is a fork of it:
a fresh process whose only advance is imports. Where forks are not safe, or not possible, kernels
start as jupyter_client starts them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenlib import stages

# What the chapters import. Packages that look for a notebook while they are imported (tqdm.auto,
# and with it datasets and transformers) are left to the kernel itself.
MODULES = (
    "ipykernel.kernelapp", "numpy", "torch", "pandas", "matplotlib.pyplot", "seaborn",
    "torch.distributed.checkpoint", "jinja2", "tokenizers", "safetensors.torch",
)  # fmt: skip
# Forks cannot use a GPU that their parent has asked about, as some packages do when imported.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
TIMEOUT = 180.0  # seconds for the imports


class KernelParent:
    """The process that kernels are forked from; a context manager, which ends it."""

    def __init__(self, modules: Sequence[str] = MODULES):
        self.modules = modules
        self._process: subprocess.Popen | None = None
        self._lines: Any = None
        self._kernel: Kernel | None = None  # the one started last
        self._stop_with = 0

    def __enter__(self) -> KernelParent:
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, and with it any kernel that is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._hang_up()

    def start(self) -> None:
        """Begin the imports, if that has not been done; does not wait for them."""
        gpu = any(Path(device).exists() for device in GPU_DEVICES)
        if self._process is not None or sys.platform != "linux" or gpu:
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qwenlib.batch.kernel_parent", *self.modules],
                stdin=theirs, start_new_session=True,  # Ctrl-C is for the runner to handle
            )  # fmt: skip
            ours.settimeout(TIMEOUT)
            self._lines = ours.makefile("rw")

    def fork(self, command: Sequence[str], env: Mapping[str, str], cwd: str) -> Kernel | None:
        """A kernel for this command, or None when it is to be started in the usual way.

        Waits for the imports.
        """
        if not self._lines or "ipykernel_launcher" not in command or command[0] != sys.executable:
            return None
        argv = list(command[command.index("ipykernel_launcher") + 1 :])
        try:
            self._lines.write(json.dumps({"argv": argv, "env": dict(env), "cwd": cwd}) + "\n")
            self._lines.flush()
            return Kernel(json.loads(self._lines.readline())["pid"])
        except (OSError, ValueError):  # the process is gone, or hangs
            self._hang_up()
            return None

    def stop(self, number: int) -> None:
        """Send a signal to the kernel that was started last, and to any that still starts."""
        self._stop_with = number
        if self._kernel is not None:
            self._kernel.send_signal(number)

    def _started(self, pid: int) -> None:
        self._kernel = Kernel(pid)
        if self._stop_with:  # it came while the kernel was being started
            self._kernel.send_signal(self._stop_with)

    def _hang_up(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            with contextlib.suppress(OSError):  # the rest of a request that nobody reads
                lines.close()

    def manager_class(self) -> type:
        """A kernel manager for nbclient whose kernels come from here."""
        from jupyter_client.manager import AsyncKernelManager
        from jupyter_client.provisioning import LocalProvisioner

        parent = self

        class Provisioner(LocalProvisioner):
            async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
                kernel = parent.fork(cmd, kwargs["env"], str(kwargs.get("cwd") or Path.cwd()))
                if kernel is None:
                    info = await super().launch_kernel(cmd, **kwargs)
                else:
                    self.process, self.pid, self.pgid = kernel, kernel.pid, kernel.pid
                    info = self.connection_info
                parent._started(self.pid)
                return info

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **kwargs: Any) -> None:
                if self.provisioner is None:
                    self.kernel_id = self.kernel_id or str(uuid.uuid4())
                    self.provisioner = Provisioner(
                        parent=self, kernel_id=self.kernel_id, kernel_spec=self.kernel_spec
                    )
                await super().start_kernel(**kwargs)

        return Manager


class Kernel:
    """A forked kernel with the methods of `subprocess.Popen` that jupyter_client calls."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid
        self._started = stages.process_started(pid)

    def poll(self) -> int | None:
        """None while it runs, then 0: its exit code is known to its parent only."""
        alive = self._started is not None and stages.process_started(self.pid) == self._started
        return None if alive else 0

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("kernel", timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # gone since
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
