"""Rows of a run: once each after a resume, the same in wandb's files, and without wandb at all."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from qwenlib import stages
from qwenlib.recorder import Recorder


@contextlib.contextmanager
def folder():
    """A new folder (guards of mutations take no fixtures)."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def log(recorder, first, last, evaluated=()):
    for step in range(first, last + 1):
        recorder.log({"loss": 1 / step, "count": torch.tensor(step)}, step)
        if step in evaluated:
            recorder.log({"eval/loss": 2 / step}, step)


def steps(recorder, key="loss"):
    return [row["step"] for row in recorder.history() if key in row]


def test_rows_are_plain_json():
    with folder() as where:
        recorder = Recorder(where / "new", wandb_mode="disabled")
        recorder.log({"loss": torch.tensor(2.5), "lr": math.nan, "shares": torch.ones(2)}, 7)
        text = (where / "new" / "metrics.jsonl").read_text()
        assert text == '{"step": 7, "loss": 2.5, "lr": null, "shares": [1.0, 1.0]}\n'
        with pytest.raises(TypeError, match="got object"):
            recorder.log({"loss": object()}, 8)
    with pytest.raises(ValueError, match="'offlin'"):
        Recorder(where, wandb_mode="offlin")


def test_a_resumed_run_repeats_no_step():
    """Killed in the middle of a line after step 5; its last checkpoint was that of step 3."""
    with folder() as where:
        first = Recorder(where, wandb_mode="disabled")
        log(first, 1, 5, evaluated=(2, 4))
        with first.path.open("a") as file:
            file.write('{"step": 6, "lo')
        again = Recorder(where, wandb_mode="disabled")
        log(again, 4, 8, evaluated=(4, 6, 8))
        assert steps(again) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert steps(again, "eval/loss") == [2, 4, 6, 8]
        straight = Recorder(where / "straight", wandb_mode="disabled")
        log(straight, 1, 8, evaluated=(2, 4, 6, 8))
        assert (
            again.path.read_text().splitlines()[-5:] == straight.path.read_text().splitlines()[-5:]
        )


def test_the_run_id_follows_folder_and_identity():
    with folder() as where:
        here = Recorder(where, identity="seed 0")
        assert here.run_id == Recorder(str(where), identity="seed 0").run_id
        assert here.run_id != Recorder(where, identity="seed 1").run_id
        assert here.run_id != Recorder(where / "other", identity="seed 0").run_id


def test_only_rank_0_writes():
    with folder() as where, mock.patch.dict(os.environ, RANK="1"):
        other = Recorder(where / "new", wandb_mode="offline")
        log(other, 1, 2)
        other.finish({"loss": 1})
        assert not (where / "new").exists()
        os.environ["RANK"] = "0"
        log(Recorder(where / "new", wandb_mode="disabled"), 1, 2)
        assert steps(other) == [1, 2]


def read_back(path, kind):
    """Records of an offline run, from wandb's own tool."""
    wandb = Path(sys.executable).parent / "wandb"
    done = subprocess.run([wandb, "leet", "inspect", "--json", path], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record[kind] for record in records if record["type"] == kind]


SETTINGS = {"identity": "seed 0", "name": "tiny/06", "config": {"lr": 1e-3}}
KILLED = f"""import os, signal, sys
from qwenlib.recorder import Recorder
from tests.test_recorder import log
log(Recorder(sys.argv[1], **{SETTINGS}), 1, 5, evaluated=(2, 4))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_newest_offline_file_holds_the_whole_run():
    """Also the rows of the process that was killed: an upload of it replaces the earlier file."""
    with folder() as where:
        other = Recorder(where / "other", **SETTINGS)  # what it leaves behind is not in the way
        log(other, 1, 2)
        other.finish()
        env = os.environ | {"PYTHONPATH": str(stages.PACKAGE.parent)}
        done = subprocess.run([sys.executable, "-c", KILLED, str(where)], env=env)
        assert done.returncode == -signal.SIGKILL
        recorder = Recorder(where, **SETTINGS)
        log(recorder, 4, 7, evaluated=(4, 6))  # from the checkpoint of step 3
        recorder.finish({"perplexity": 9.5})
        files = sorted((where / "wandb").glob("offline-run-*/run-*.wandb"))
        assert [file.name for file in files] == [f"run-{recorder.run_id}.wandb"] * 2
        (run,) = read_back(files[-1], "run")
        assert run["run_id"] == recorder.run_id and run["config"]["update"]["lr"] == 1e-3
        assert {"update": {"perplexity": 9.5}} in read_back(files[-1], "summary")
        rows = [
            {key: value for key, value in row["item"].items() if key[0] != "_"}
            for row in read_back(files[-1], "history")
        ]

        def order(row):
            return sorted(row), row["step"]

        assert sorted(rows, key=order) == sorted(recorder.history(), key=order)
        assert steps(recorder) == [1, 2, 3, 4, 5, 6, 7]
        assert steps(recorder, "eval/loss") == [2, 4, 6]


# Trains with each way of recording in turn; prints a hash of the rows, the weights and the next
# random numbers.
SAME = """import hashlib, pathlib, random, sys, warnings
import numpy, torch
from qwenlib.recorder import Recorder
from qwenlib.training import TrainConfig, train

class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "wandb":
            raise ImportError("no wandb here")

def run(where, mode):
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Dropout(0.5))
    recorder = Recorder(pathlib.Path(sys.argv[1], where), wandb_mode=mode)
    def loss(model, batch):
        x = torch.rand(8, 4)
        return (model(x) - x.sum(1, keepdim=True)).square().sum(), torch.tensor(8), {}
    train(model, lambda step: [step, step], loss, TrainConfig(5, 0.01, workers=1),
          log=lambda row, step: recorder.log({**row, "seconds": 0, "peak_memory_mb": 0}, step),
          show_progress=False)
    recorder.finish({"done": 1})
    end = (recorder.path.read_bytes(), [p.tolist() for p in model.parameters()],
           random.random(), numpy.random.rand(), torch.rand(()).item())
    print(where, hashlib.sha256(repr(end).encode()).hexdigest(), len(recorder.history()))

run("disabled", "disabled")
sys.meta_path.insert(0, Refuse())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    run("missing", "offline")
assert ["no wandb here" in str(w.message) for w in caught] == [True], caught
assert "wandb" not in sys.modules
del sys.meta_path[0]
run("offline", "offline")
assert "wandb" in sys.modules
"""


def test_without_wandb_nothing_else_changes(tmp_path):
    env = os.environ | {"PYTHONPATH": str(stages.PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SAME, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["disabled", "missing", "offline"]
    assert len({tuple(same) for _, *same in lines}) == 1 and lines[0][2] == "5"
    assert [p.name for p in tmp_path.glob("*/wandb")] == ["wandb"]
