import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwenlib.data.shards import write_shards
from qwenlib.scaling import sweep


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    texts = [np.cumsum(rng.integers(1, 3, size=60)) % 50 for _ in range(60)]
    return (
        write_shards(tmp_path / "train", texts[:50], 50),
        write_shards(tmp_path / "heldout", texts[50:], 50),
    )


@pytest.fixture
def plan(shards):
    base = sweep.SweepRun(
        hidden_size=16, num_hidden_layers=1, head_dim=8, ffn_ratio=2, vocab_size=50, seq_len=16,
        batch_size=8, steps=4, learning_rate=0.02, eval_batches=2, data=sweep.data_id(*shards),
    )  # fmt: skip
    return [dataclasses.replace(base, steps=steps) for steps in (4, 60)]


def test_rows_describe_the_runs(plan, shards, tmp_path):
    rows = sweep.run_sweep(plan, *shards, tmp_path / "sweep.csv")
    assert [row["D"] for row in rows] == [4 * 8 * 16, 60 * 8 * 16]
    model = sweep.Qwen(plan[0].config)
    assert rows[0]["N"] == sum(p.numel() for p in model.parameters())
    assert rows[0]["N"] - rows[0]["N_body"] == 50 * 16
    assert rows[0]["C"] > 6 * rows[0]["N_body"] * rows[0]["D"]  # the head costs too
    assert rows[1]["C"] == pytest.approx(15 * rows[0]["C"])
    # Steps are 1 or 2 upwards, at random: between ln 2 for a perfect model and ln 50 for none.
    assert np.log(50) > rows[0]["heldout_loss"] > rows[1]["heldout_loss"] + 0.5 > np.log(2)


def test_a_killed_sweep_goes_on(plan, shards, tmp_path, monkeypatch):
    straight = sweep.run_sweep(plan, *shards, tmp_path / "straight.csv")
    path = tmp_path / "sweep.csv"

    def kill(row, index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(plan, *shards, path, log=kill)
    assert set(sweep.read_rows(path)) == {plan[0].key}
    trained = []
    original = sweep.train_one

    def counted(planned, *rest):
        trained.append(planned.steps)
        return original(planned, *rest)

    monkeypatch.setattr(sweep, "train_one", counted)
    resumed = sweep.run_sweep(plan, *shards, path)
    assert trained == [60]
    for a, b in zip(straight, resumed, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    monkeypatch.setattr(sweep, "train_one", lambda *a: pytest.fail("trained a finished run"))
    assert sweep.run_sweep(plan, *shards, path) == list(sweep.read_rows(path).values())


def test_key_follows_every_setting(plan):
    run = plan[0]
    changed = [
        dataclasses.replace(run, steps=5), dataclasses.replace(run, learning_rate=0.021),
        dataclasses.replace(run, seed=1), dataclasses.replace(run, data="other"),
    ]  # fmt: skip
    assert len({r.key for r in [run, *changed]}) == 5


def test_bad_input_is_named(plan, shards, tmp_path):
    other = dataclasses.replace(plan[0], data="0" * 12)
    with pytest.raises(ValueError, match="planned for data"):
        sweep.run_sweep([other], *shards, tmp_path / "sweep.csv")
    with pytest.raises(ValueError, match="head_dim"):
        dataclasses.replace(plan[0], hidden_size=12).config  # noqa: B018
    (tmp_path / "old.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="old.csv"):
        sweep.read_rows(tmp_path / "old.csv")


def test_two_workers_give_the_rows_of_one(plan, shards, tmp_path):
    one = sweep.run_sweep(plan, *shards, tmp_path / "one.csv")
    two = sweep.run_sweep(plan, *shards, tmp_path / "two.csv", workers=2)
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert list(sweep.read_rows(tmp_path / "two.csv")) == [run.key for run in plan]


SWEEP = """
import sys
from qwenlib.data.shards import TokenShards
from qwenlib.scaling import sweep
if __name__ == "__main__":
    shards = [TokenShards(f"{sys.argv[1]}/{part}") for part in ("train", "heldout")]
    runs = [
        sweep.SweepRun(
            hidden_size=16, num_hidden_layers=1, head_dim=8, ffn_ratio=2, vocab_size=50,
            seq_len=16, batch_size=8, steps=100_000 + i, learning_rate=0.02, eval_batches=2,
            data=sweep.data_id(*shards),
        )
        for i in range(2)
    ]
    sweep.run_sweep(runs, *shards, f"{sys.argv[1]}/sweep.csv", workers=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_workers_die_with_a_killed_sweep(shards, tmp_path):
    script = tmp_path / "long_sweep.py"
    script.write_text(SWEEP)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])

    def workers():
        """Living processes that run the script: the parent and its workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, state, ppid = re.match(r"(\d+) \(.*\) (\w) (\d+)", path.read_text()).groups()
                command = (path.parent / "cmdline").read_text()
                if int(ppid) == parent.pid and state != "Z" and "spawn_main" in command:
                    found.append(int(pid))
        return found

    def alive(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        return False

    try:
        until = time.monotonic() + 60
        while len(started := workers()) < 2:
            assert time.monotonic() < until and parent.poll() is None, "no workers"
            time.sleep(0.2)
        parent.kill()
        parent.wait()
        until = time.monotonic() + 30
        while any(map(alive, started)):
            assert time.monotonic() < until, "workers outlive the sweep"
            time.sleep(0.2)
    finally:
        parent.kill()
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)
