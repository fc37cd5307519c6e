"""A run that is asked to leave: what it saves, says and ends with; that it goes on from there."""

import json
import os
import random
import signal
import subprocess
import time

import pytest

from qwenlib.batch import kernels, signals
from qwenlib.batch.kernels import KernelParent
from qwenlib.batch.params import EnvironmentProblem
from qwenlib.batch.signals import Notice
from tests.batch.test_kernels import gone, kernel

TRAINS = """import time, torch
from qwenlib.training import TrainConfig, train
def loss(net, batch):
    x = torch.rand(8, 4)
    time.sleep(p.pause)
    return (net(x) - x.sum(1, keepdim=True)).square().sum(), torch.tensor(8), {}
def log(row, step):
    print("step", step, flush=True)
    run.log({"loss": row["loss"]}, step)
    with open(run.dir / "steps.txt", "a") as file:
        file.write(f"{step}\\n")
net = torch.nn.Linear(4, 1)
config = TrainConfig(p.max_steps, p.learning_rate, save_every=1000, grad_clip=1.0)
train(net, lambda step: [step], loss, config, out_dir=run.dir, log=log, show_progress=False)
(run.dir / "steps.txt").unlink()
metrics = {"weight": net.weight.sum().item(), "losses": sum(r["loss"] for r in run.history())}
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "GPU_DEVICES", ())


class Parent:
    """Stands for a KernelParent: the signals that its kernel is sent."""

    def __init__(self):
        self.sent = []

    def stop(self, number):
        self.sent.append(number)


def test_a_notice_is_passed_on_and_has_an_end():
    parent = Parent()
    before = [signal.getsignal(number) for number in (*signals.SIGNALS, signal.SIGALRM)]
    with Notice(parent, grace=60) as notice:
        assert not notice.number
        os.kill(os.getpid(), signal.SIGUSR1)
        assert parent.sent == [signal.SIGUSR1]
        assert str(notice) == "SIGUSR1: the stage was not training and was ended"
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        os.kill(os.getpid(), signal.SIGTERM)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= left, "asked twice, twice the time"
        os.kill(os.getpid(), signal.SIGALRM)
        assert parent.sent == [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL]
        assert str(notice) == "SIGTERM: the stage did not leave within 60 s and was ended"
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert before == [signal.getsignal(number) for number in (*signals.SIGNALS, signal.SIGALRM)]
    with pytest.raises(ValueError, match="grace must be more than 0"):
        Notice(parent, 0)


def test_a_signal_to_all_of_a_job_leaves_the_kernel_to_save():
    """Not the process it was forked from, with which it would be killed."""
    with KernelParent(()) as parent:
        parent.start()
        with kernel(parent) as run:
            run("import signal; n = []; signal.signal(signal.SIGTERM, lambda *_: n.append(1))")
            for number in signals.SIGNALS:
                parent._process.send_signal(number)
            parent.stop(signal.SIGTERM)
            assert run("print(n)") == "[1]" and parent._process.poll() is None
            assert run("print(signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL)") == "True"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_kernel_that_starts_after_the_signal_gets_it_too(gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(kernels, "GPU_DEVICES", ("/dev/null",))
    with KernelParent(()) as parent:
        parent.start()
        parent.stop(signal.SIGTERM)
        with pytest.raises(RuntimeError, match="died"), kernel(parent):
            pass


def fake_scontrol(folder, code=0):
    """A `scontrol` first on the PATH that notes its arguments."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\necho no such job >&2\nexit {code}\n'
    )
    script.chmod(0o755)
    return {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


def test_a_job_is_queued_again(tmp_path, monkeypatch):
    for name, value in fake_scontrol(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert signals.requeue(signals.slurm_job()) == ""
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(EnvironmentProblem, match="--requeue is for Slurm jobs"):
        signals.slurm_job()


def test_what_keeps_a_job_from_the_queue_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "job 77 is not queued again: [Errno 2]" in signals.requeue("77")
    monkeypatch.setenv("PATH", fake_scontrol(tmp_path, 1)["PATH"])
    assert signals.requeue("77") == "job 77 is not queued again: no such job"


def test_requeue_outside_of_slurm_is_refused_at_once(walk, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    code, line, _ = walk.qwenlib("run", "1", "--requeue")
    assert code == 3 and "SLURM_JOB_ID is not set" in line["error"]
    assert not walk.runs.exists()


def asked_to_leave(walk, number, arguments, environ=None):
    """Send the command a signal at a random moment of its training; its exit code and last line."""
    process = subprocess.Popen(
        walk.command(*arguments), env=walk.env | (environ or {}), cwd=walk.root,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    steps = walk.runs / "default" / "02_second" / "steps.txt"
    before = steps.read_text() if steps.exists() else ""
    end = time.monotonic() + 90
    while not steps.exists() or steps.read_text() == before:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, json.loads(out.splitlines()[-1]), err


@pytest.mark.slow
def test_a_preempted_run_saves_is_queued_again_and_goes_on(walk, tmp_path):
    walk.write("02_second", TRAINS)
    arguments = ("run", "2", "-p", "max_steps=40", "-p", "pause=0.05")
    code, straight, err = walk.qwenlib(*arguments, "--run-dir", "runs/straight")
    assert code == 0, err
    stage = walk.runs / "default" / "02_second"
    code, line, err = asked_to_leave(
        walk, signal.SIGUSR1, (*arguments, "--requeue"), fake_scontrol(tmp_path)
    )
    assert code == 75 and not line["ok"], err
    step = int((stage / "steps.txt").read_text().split()[-1])
    assert 1 <= step < 40
    why = f"SIGUSR1: stopped after step {step}; the state is saved, run again to go on"
    assert line["stages"]["02_second"]["status"] == "preempted"
    assert line["stages"]["02_second"]["error"] == why
    recorded = walk.results("02_second")
    assert (recorded["status"], recorded["error"]) == ("preempted", why)
    assert ">preempted</em>" in (walk.runs / "default/index.html").read_text()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    code, line, _ = asked_to_leave(walk, signal.SIGTERM, arguments)
    assert code == 75
    assert (tmp_path / "asked").read_text() == "requeue 77\n", "queued without being asked to"
    steps = (stage / "steps.txt").read_text()
    code, line, err = walk.qwenlib(*arguments)
    assert code == 0 and "was interrupted, goes on" in err
    assert line["stages"]["02_second"]["metrics"] == straight["stages"]["02_second"]["metrics"]
    assert steps.split() == [str(k + 1) for k in range(len(steps.split()))], "a step came twice"
    rows = [json.loads(row)["step"] for row in (stage / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 41))


@pytest.mark.slow
def test_a_stage_that_does_not_leave_is_killed(walk):
    walk.write("02_second", TRAINS.replace("p.pause", "p.pause if batch == 0 else 60"))
    arguments = ("run", "2", "-p", "max_steps=4", "--grace", "1")
    began = time.monotonic()
    code, line, err = asked_to_leave(walk, signal.SIGTERM, arguments)
    assert code == 75 and time.monotonic() - began < 45
    assert "did not leave within 1 s and was ended" in line["stages"]["02_second"]["error"]
    note = json.loads((walk.runs / "default/02_second/started.json").read_text())
    assert gone(note["pid"], note["pid_started"])
