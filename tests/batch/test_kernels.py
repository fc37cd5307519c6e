"""Forked kernels: what they inherit, that none outlives its run, where they are not forked."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenlib import stages
from qwenlib.batch import kernels
from qwenlib.batch.kernels import KernelParent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "GPU_DEVICES", ())
    path = [str(stages.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@contextlib.contextmanager
def kernel(parent):
    """A started kernel: a function that runs code in it and returns what that prints."""
    from jupyter_client.utils import run_sync

    manager = parent.manager_class()(kernel_name="python3")
    run_sync(manager.start_kernel)(extra_arguments=["--log-level=50"])
    client = manager.client()
    client.start_channels()

    def run(code):
        printed = []

        def collect(message):
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))

        run_sync(client.execute_interactive)(code, output_hook=collect, timeout=60)
        return "".join(printed).strip()

    run_sync(client.wait_for_ready)(timeout=60)
    run.pid = manager.provisioner.pid
    try:
        yield run
    finally:
        client.stop_channels()
        run_sync(manager.shutdown_kernel)()


def gone(pid, mark, seconds=10):
    end = time.monotonic() + seconds
    while stages.process_started(pid) == mark:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


FACTS = """import os, random, sys
print("colorsys" in sys.modules, "qwenlib.batch" in sys.modules, "mine" in globals(),
      os.getcwd(), os.environ.get("LATE"), sys.argv[0], "" in sys.path,
      random.random(), os.getppid())
mine = 1"""


def test_kernels_are_fresh_processes_whose_only_advance_is_imports(tmp_path, monkeypatch):
    with KernelParent(["colorsys", "no_such_package"]) as parent:
        parent.start()
        monkeypatch.chdir(tmp_path)  # after the parent has started
        monkeypatch.setenv("LATE", "yes")
        found = []
        for _ in range(2):
            with kernel(parent) as run:
                found.append(run(FACTS).split())
        first, second = found
        same = ["True", "False", "False", str(tmp_path), "yes", "ipykernel_launcher", "True"]
        assert first[:7] == second[:7] == same
        assert first[7] != second[7], "both kernels draw the same random numbers"
        assert first[8] == second[8] != str(os.getpid()), "not forked from one parent"


def test_a_kernel_reads_the_library_as_it_is_when_it_starts(tmp_path, monkeypatch):
    """Even a module that the parent has loaded."""
    package = tmp_path / "qwenlib"
    (package / "batch").mkdir(parents=True)
    for name in ("__init__.py", "batch/__init__.py", "batch/kernel_parent.py"):
        (package / name).write_text((stages.PACKAGE / name).read_text())
    for name in ("notebook.py", "plotting.py", "recorder.py", "stages.py"):
        (package / name).write_text((stages.PACKAGE / name).read_text())
    (package / "number.py").write_text("value = 1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with KernelParent(["qwenlib.number"]) as parent:
        parent.start()
        with kernel(parent) as run:
            assert run("from qwenlib.number import value; print(value)") == "1"
        (package / "number.py").write_text("value = 2\n")
        with kernel(parent) as run:
            assert run("from qwenlib.number import value; print(value)") == "2"


def test_a_kernel_runs_its_exit_hooks_and_leaves_nothing(tmp_path):
    with KernelParent(()) as parent:
        parent.start()
        with kernel(parent) as run:
            folder = run("import tempfile; keep = tempfile.TemporaryDirectory(); print(keep.name)")
            run(f"import atexit, pathlib; atexit.register(pathlib.Path({str(tmp_path / 'left')!r})"
                ".write_text, 'bye')")  # fmt: skip
            assert Path(folder).is_dir()
            mark = stages.process_started(run.pid)
        assert gone(run.pid, mark)
        assert not Path(folder).exists() and (tmp_path / "left").read_text() == "bye"


def test_the_end_of_a_run_ends_a_kernel_that_hangs():
    with KernelParent(()) as parent:
        parent.start()
        with kernel(parent) as run:
            mark = stages.process_started(run.pid)
            parent.__exit__()
            assert gone(run.pid, mark)


RUNNER = """import os, signal, sys
from qwenlib.batch import kernels
kernels.GPU_DEVICES = ()
parent = kernels.KernelParent(())
parent.start()
command = [sys.executable, "-m", "ipykernel_launcher", "-f", sys.argv[1]]
kernel = parent.fork(command, os.environ, os.getcwd())
print(parent._process.pid, kernel.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kernels_die_with_a_runner_that_is_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path / "kernel.json")],
        stdout=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    for pid in map(int, done.stdout.split()):
        mark = stages.process_started(pid)
        assert mark is None or gone(pid, mark)


@pytest.mark.parametrize("reason", ["a GPU", "not started", "dead"])
def test_kernels_start_in_the_usual_way_where_they_cannot_be_forked(reason, monkeypatch):
    if reason == "a GPU":
        monkeypatch.setattr(kernels, "GPU_DEVICES", ("/dev/null",))
    with KernelParent(()) as parent:
        if reason != "not started":
            parent.start()
        assert (parent._process is not None) == (reason == "dead")
        if reason == "dead":
            parent._process.kill()
        with kernel(parent) as run:
            assert run("import os; print(os.getppid())") == str(os.getpid())


def test_what_is_imported_for_all_kernels_can_be_shared():
    """No thread, no temporary folder, no GPU, and nothing that asks whether it is in a notebook."""
    code = (
        "import importlib, sys, tempfile, threading\n"
        "from qwenlib.batch.kernels import MODULES\n"
        "tempfile.mkdtemp = None  # a folder removed by the first kernel to end\n"
        "for name in MODULES:\n    importlib.import_module(name)\n"
        "import torch\n"
        "print(threading.active_count(), torch.cuda.is_initialized(),\n"
        "      [m for m in ('tqdm.auto', 'wandb', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split(maxsplit=2) == ["1", "False", "[]\n"], done.stderr
