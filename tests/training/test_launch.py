"""Functions on several processes: what they get and give back, and how their ends are told."""

import os
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
import torch
import torch.distributed as dist

from qwenlib.training import Preempted, RankFailed, by_rank, launch, next_token_loss, shard, train
from qwenlib.training.launch import _what_failed, slurm_ranks
from tests.training.test_loop import batch, model, settings


def test_a_local_function_runs_on_every_rank(capsys, tmp_path):
    offset = 3  # goes along by value

    def work(text):
        total = torch.tensor(dist.get_rank() + offset)
        dist.all_reduce(total)
        print(f"{text} of rank {dist.get_rank()}\r", end="")
        print("a warning", file=sys.stderr)
        return int(total), dist.get_world_size(), torch.get_num_threads()

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    got = launch(work, "a bar", nproc=2, device="cpu", log_dir=tmp_path / "logs")
    assert got[:2] == (2 * offset + 1, 2) and got[2] <= max(1, threads)
    shown = capsys.readouterr()
    assert "a bar of rank 0\r" in shown.out and "rank 1\r" not in shown.out
    assert "a warning" in shown.err
    kept = list((tmp_path / "logs").glob("*/attempt_0/1/stdout.log"))
    assert len(kept) == 1 and b"a bar of rank 1\r" in kept[0].read_bytes()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_rank_that_failed_is_told_and_not_those_that_waited_for_it():
    def work():
        if dist.get_rank() == 1:
            raise KeyError("the cause")
        dist.barrier()  # fails, because rank 1 is gone

    with pytest.raises(RankFailed, match=r"rank 1 of 2 failed: KeyError: 'the cause'") as caught:
        launch(work, nproc=2, device="cpu", show=False)
    first = str(caught.value).partition("\nafter it")[0]
    assert 'raise KeyError("the cause")' in first
    assert first.count('File "') == 1, "no frames but those of the function"


def test_the_earliest_failure_is_the_cause():
    def failed(at, text):
        return "failed", (at, text, f"Traceback\n{text}\n")

    later, first = failed(2.0, "RuntimeError: connection closed"), failed(1.0, "ValueError: x")
    text = _what_failed({0: later, 1: first}, {0: 1}, 2)
    assert text.startswith("rank 1 of 2 failed: ValueError: x\n\nTraceback")
    assert text.endswith("\nafter it rank 0: RuntimeError: connection closed")
    text = _what_failed({0: later}, {1: -9}, 2)
    assert text.startswith("rank 1 of 2 was ended by SIGKILL (out of memory?)\nafter it rank 0")


def test_tasks_of_a_slurm_step_are_ranks():
    step = {
        "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_PROCID": "6",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_NODELIST": "solo",
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    last = slurm_ranks(step)
    assert last["RANK"] == "6" and last["WORLD_SIZE"] == "7" and last["LOCAL_WORLD_SIZE"] == "1"
    assert last["MASTER_ADDR"] == "solo" and 1024 < int(last["MASTER_PORT"]) < 32768
    fourth = slurm_ranks(step | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"})
    assert fourth["LOCAL_RANK"] == "1" and fourth["LOCAL_WORLD_SIZE"] == "2"
    assert fourth["MASTER_PORT"] == last["MASTER_PORT"]
    given = slurm_ranks(step | {"MASTER_ADDR": "n1", "MASTER_PORT": "5"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("n1", "5")
    assert slurm_ranks({}) == slurm_ranks(step | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_ranks(step | {"RANK": "0"}) == {}, "torchrun under srun has the word"


def test_what_cannot_be_started():
    with pytest.raises(ValueError, match="-1 processes cannot be started on cpu"):
        launch(print, nproc=-1, device="cpu")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda', got 'gpu'"):
        launch(print, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there are 0 GPUs .device='cpu'"):
            launch(print, nproc=2, device="cuda")
    lock = threading.Lock()
    with pytest.raises(TypeError, match="<lambda> cannot be sent to other processes"):
        launch(lambda: lock.locked(), nproc=2, device="cpu")


@pytest.mark.slow
def test_a_killed_rank_is_named():
    def work():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    with pytest.raises(RankFailed, match=r"rank 1 of 2 was ended by SIGKILL \(out of memory\?\)"):
        launch(work, nproc=2, device="cpu", show=False)


@pytest.mark.slow
def test_an_interrupt_ends_all_and_is_one_here():
    def work():
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)

    with pytest.raises(KeyboardInterrupt):
        launch(work, nproc=2, device="cpu", show=False)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_asked_to_leave_does(whom, name):
    def work():
        def batches(step):
            if step == 3 and dist.get_rank() == 1:
                pid = os.getpid() if whom == "rank" else os.getppid()
                os.kill(pid, signal.Signals[name])
            return [batch(step)]

        train(shard(model()), by_rank(batches), next_token_loss, settings(max_steps=10**6),
              show_progress=False)  # fmt: skip

    with pytest.raises(Preempted) as caught:
        launch(work, nproc=2, device="cpu", show=False)
    assert caught.value.name == name and caught.value.code == 75
    assert caught.value.step == 4 if whom == "rank" else caught.value.step >= 4


SCRIPT = """
import sys
import torch.distributed as dist
from qwenlib.training import launch

def work(number):
    assert dist.is_initialized()
    return number + dist.get_rank()

if __name__ == "__main__":
    value = launch(work, 5, device="cpu")
    open(f"{sys.argv[1]}/{value}", "w").close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["-m", "torch.distributed.run", "--standalone",
                                      "--nproc-per-node=2"]])  # fmt: skip
def test_a_script_alone_and_under_torchrun(how, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    subprocess.run([sys.executable, *how, script, out], check=True)
    want = ["5", "6"] if how else ["5"]  # under torchrun each rank has its own value
    assert sorted(file.name for file in out.iterdir()) == want


LATE = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from qwenlib.training import launch

connected, join = Path(sys.argv[1]), dist.init_process_group
if os.environ["RANK"] == "1":
    def late(*args):
        join(*args)
        time.sleep(1)
        connected.touch()
    dist.init_process_group = late
assert launch(connected.exists, device="cpu")
"""


@pytest.mark.slow
def test_no_rank_goes_on_before_all_are_connected(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LATE)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *command, script, tmp_path / "connected"], check=True)


@pytest.mark.slow
def test_from_a_notebook_whose_cells_hold_the_function():
    from nbclient import NotebookClient

    cells = [
        "from dataclasses import dataclass\nfrom qwenlib.training import launch\n"
        "import torch.distributed as dist\nfactor = 10\n"
        "@dataclass\nclass Answer:\n    value: int\n"
        "def work(x):\n    print('from rank', dist.get_rank())\n"
        "    return Answer(factor * x + dist.get_world_size())",
        "answer = launch(work, 4, nproc=2, device='cpu')",
        "print(answer == Answer(42))",
        "def bad():\n    raise ValueError('in a cell')",
        "try:\n    launch(bad, nproc=2, device='cpu')\nexcept RuntimeError as error:\n"
        "    print(str(error).splitlines()[0])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    _, ran, same, _, failed = (
        "".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells
    )
    assert "from rank 0" in ran and "from rank 1" not in ran
    assert same == "True\n"
    assert failed[7:] == "of 2 failed: ValueError: in a cell\n"
