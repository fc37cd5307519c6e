"""A training run that is asked to leave saves its step, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from qwenlib import stages
from qwenlib.training import Preempted, TrainConfig, train
from qwenlib.training.preemption import EXIT_CODE, Preemption

STEPS = 6


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))


def loss(net, batch):
    x = torch.rand(8, 4)
    return (net(x) - x.sum(1, keepdim=True)).square().sum(), torch.tensor(8), {}


def run(folder, signal_at=None, number=signal.SIGTERM, save_every=4, log=None):
    """Train, sending a signal to this process in a step; returns rows and weights."""

    def tell(row, step):
        if step == signal_at and "loss" in row:
            os.kill(os.getpid(), number)
        if log:
            log(row, step)

    net = model()
    config = TrainConfig(STEPS, 0.01, save_every=save_every, eval_every=2)
    result = train(
        net, lambda step: [step], loss, config,
        out_dir=folder, log=tell, show_progress=False,
        evaluate=lambda net: {"first": next(net.parameters()).sum().item()},
    )  # fmt: skip
    rows = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in result.history]
    return rows, result.evaluations, [p.tolist() for p in net.parameters()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [1, 2, 4, STEPS])
def test_a_run_that_left_goes_on_bit_for_bit(number, step):
    with tempfile.TemporaryDirectory() as cut, tempfile.TemporaryDirectory() as whole:
        before = signal.getsignal(number)
        with pytest.raises(Preempted) as left:
            run(cut, step, number)
        assert left.value.code == EXIT_CODE == 75
        assert str(left.value).startswith(f"{number.name}: stopped after step {step}; the state is")
        assert signal.getsignal(number) == before
        assert [p.name for p in Path(cut, "state").glob("step_*")] == [f"step_{step:08d}"]
        torch.manual_seed(5)  # another process has another generator
        steps = []
        assert run(cut, log=lambda row, step: steps.append(step)) == run(whole)
        assert min(steps, default=STEPS + 1) == step + 1, "a step was repeated"


def test_without_a_state_it_leaves_all_the_same():
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(
            Preempted, match="SIGTERM: stopped after step 3; no state was asked for"
        ):
            run(folder, 3, save_every=0)
        assert not Path(folder, "state").exists()


def test_off_outside_the_main_thread():
    with tempfile.TemporaryDirectory() as folder:
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        seen = []

        def look(row, step):
            seen.append([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)])

        thread = threading.Thread(target=run, args=(folder,), kwargs={"log": look})
        thread.start()
        thread.join()
        assert len(seen) > STEPS and all(handlers == before for handlers in seen)


# Rank 1 alone gets a signal, in step 3.
RANK = """import os, signal, sys
import torch.distributed as dist
from tests.training.test_preemption import run
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
run(f"{sys.argv[2]}/{rank}", 3 if rank else None, signal.SIGUSR1)
"""


def test_ranks_leave_together_with_exit_code_75(tmp_path):
    env = os.environ | {"PYTHONPATH": str(stages.PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=env)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=100) for rank in ranks] == [EXIT_CODE] * 2
    states = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/state/step_*"))
    assert states == ["0/state/step_00000003", "1/state/step_00000003"]


def test_a_signal_to_another_rank_counts():
    def all_reduce(tensor, operation):
        tensor.fill_(max(int(tensor), int(signal.SIGUSR1)))

    group = {"is_initialized": lambda: True, "get_world_size": lambda: 2,
             "all_reduce": all_reduce}  # fmt: skip
    with mock.patch.multiple("torch.distributed", **group), Preemption() as preemption:
        assert preemption.requested()
        with pytest.raises(Preempted, match="SIGUSR1: stopped after step 7"):
            preemption.leave(7, True)


def test_a_signal_between_two_steps_is_not_lost():
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested() and preemption.requested()
