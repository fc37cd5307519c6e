"""Plans, skipping, failures and killed runs; the tests with kernels are marked slow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from qwenlib import stages
from qwenlib.batch import runner
from qwenlib.batch.params import EnvironmentProblem, Given
from qwenlib.stages import ParameterError


def texts(**values):
    return Given(texts=values)


def names(plan):
    return [step.name for step in plan.steps]


def finish_by_hand(walk, name):
    """Records of a finished stage under the default parameters."""
    plan = runner.make_plan(name, Given())
    step = plan.steps[-1]
    fingerprint, parts = stages.fingerprint(step.resolved, plan.run_dir)
    stages.write_json(
        plan.run_dir / name / "results.json",
        {
            "status": "done", "fingerprint": fingerprint, "fingerprint_parts": parts,
            "seconds": 1.0, "metrics": {}, "outputs": {}, "profile": "tiny",
        },
    )  # fmt: skip


def test_a_plan_has_the_missing_needs_first(walk):
    assert names(runner.make_plan("4", Given())) == ["01_first", "02_second", "04_last"]
    finish_by_hand(walk, "01_first")
    assert names(runner.make_plan("4", Given())) == ["02_second", "04_last"]
    finish_by_hand(walk, "02_second")
    assert names(runner.make_plan("4", Given())) == ["04_last"]
    assert len(names(runner.make_plan("all", Given()))) == 4


def test_needs_share_profile_and_seed_but_not_the_chapters_own_parameters(walk):
    plan = runner.make_plan("2", texts(seed="7", profile="small", max_steps="5"))
    first, second = (step.resolved.params for step in plan.steps)
    assert (first["seed"], first["profile"], first["max_steps"]) == (7, "small", 30)
    assert (second["seed"], second["profile"], second["max_steps"]) == (7, "small", 5)


def test_all_applies_a_parameter_where_it_is_known(walk):
    plan = runner.make_plan("all", texts(pause="0.5"))
    assert [step.given for step in plan.steps] == [{}, {"pause": 0.5}, {}, {}]
    with pytest.raises(ParameterError, match="of all chapters; did you mean 'pause'"):
        runner.make_plan("all", texts(pauze="1"))


def test_skipping_follows_the_fingerprint_and_says_what_changed(walk):
    finish_by_hand(walk, "01_first")

    def state(**values):
        plan = runner.make_plan("1", texts(**values))
        return runner.state(plan, plan.steps[0])

    assert state() == (True, "unchanged")
    assert state(max_steps="3") == (True, "unchanged")
    assert state(seed="4") == (False, "changed: seed")
    walk.write("01_first", "metrics = {}")
    assert state() == (False, "changed: notebook")


def test_the_dry_run_looks_ahead_and_writes_nothing(walk):
    rows = runner.dry_run(runner.make_plan("4", texts(profile="full")))
    assert [(step.name, action) for step, action, _ in rows] == [
        ("01_first", "run (not run yet)"),
        ("02_second", "run (after 01_first)"),
        ("04_last", "run (after 02_second)"),
    ]
    assert rows[0][2]["devices"] == "8 x H100 80GB"
    assert not walk.runs.exists()


def test_a_folder_in_use_is_refused(walk):
    folder = walk.runs / "default" / "01_first"
    folder.mkdir(parents=True)
    with runner._only_writer(folder, "01_first"):
        with pytest.raises(EnvironmentProblem, match="another qwenlib run is working on 01_first"):
            with runner._only_writer(folder, "01_first"):
                pass


@pytest.mark.parametrize("runner_lives", [True, False])
def test_a_kernel_that_outlived_its_runner_is_ended(walk, runner_lives):
    folder = walk.runs / "default" / "01_first"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        note = {
            "host": socket.gethostname(),
            "pid": sleeper.pid,
            "pid_started": stages.process_started(sleeper.pid),
            "runner": os.getpid(),
            "runner_started": stages.process_started(os.getpid()) if runner_lives else "0",
        }
        stages.write_json(folder / "started.json", note)
        with runner._only_writer(folder, "01_first"):
            assert (sleeper.poll() is None) == runner_lives
    finally:
        sleeper.kill()
        sleeper.wait()


def test_exit_codes():
    done, failed = runner.Result("done"), runner.Result("failed")
    assert runner.exit_code({"a": done}) == 0
    assert runner.exit_code({"a": done, "b": failed}) == 1
    assert runner.exit_code({"a": runner.Result("interrupted")}) == 130
    assert runner.exit_code({"a": done, "b": runner.Result("preempted")}) == 75


def test_one_stage_runs_fails_and_is_reported(walk):
    code, line, err = walk.qwenlib("run", "3", "-p", "fail=true")
    assert code == 1 and not line["ok"]
    stage = line["stages"]["03_other"]
    assert stage["status"] == "failed" and "check 'works' failed" in stage["error"]
    assert "cell 5 of" in err and 'run.check("works", not p.fail' in err
    assert walk.results("03_other")["status"] == "failed"
    assert "check &#x27;works&#x27; failed" in (walk.runs / "default/index.html").read_text()


@pytest.mark.slow
def test_the_walk_runs_then_skips_then_reruns_what_changed(walk):
    code, line, _ = walk.qwenlib("run", "all")
    assert code == 0 and line["ok"]
    assert {s["status"] for s in line["stages"].values()} == {"done"}
    assert (walk.runs / "default/04_last/notebook.html").exists()
    code, again, _ = walk.qwenlib("run", "all")
    assert code == 0 and all(s.get("skipped") for s in again["stages"].values())
    assert {k: s["metrics"] for k, s in again["stages"].items()} == {
        k: s["metrics"] for k, s in line["stages"].items()
    }
    walk.write("02_second", "metrics = {'total': 0}")
    _, third, _ = walk.qwenlib("run", "all")
    skipped = {name for name, stage in third["stages"].items() if stage.get("skipped")}
    assert skipped == {"01_first", "03_other"}


@pytest.mark.slow
def test_a_failure_blocks_only_what_needs_it(walk):
    walk.write("02_second", "raise RuntimeError('broken')\nmetrics = {}")
    code, line, _ = walk.qwenlib("run", "all")
    status = {name: stage["status"] for name, stage in line["stages"].items()}
    assert code == 1 and status == {
        "01_first": "done", "02_second": "failed", "03_other": "done", "04_last": "blocked",
    }  # fmt: skip


def wait_for(path, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def killed_in_the_loop(walk, how):
    """Start the second stage slowly, stop it after its first step; returns the kernel's id."""
    arguments = ("run", "2", "-p", "pause=0.5", "-p", "max_steps=6")
    process = subprocess.Popen(
        walk.command(*arguments), env=walk.env, cwd=walk.root,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    stage = walk.runs / "default" / "02_second"
    wait_for(stage / "state" / "last.json")
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    return arguments, json.loads((stage / "started.json").read_text()), process.returncode, out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_and_ends_with_the_same_metrics(walk, how):
    _, straight, _ = walk.qwenlib("run", "2", "-p", "max_steps=6", "--run-dir", "runs/straight")
    arguments, note, code, out = killed_in_the_loop(walk, how)
    if how == signal.SIGTERM:
        assert code == 75
        stage = json.loads(out.splitlines()[-1])["stages"]["02_second"]
        assert stage["status"] == "preempted" and "was not training" in stage["error"]
    end = time.monotonic() + 10
    while stages.process_started(note["pid"]) == note["pid_started"]:
        assert time.monotonic() < end, "the kernel outlived its runner"
        time.sleep(0.05)
    stage = walk.runs / "default" / "02_second"
    written = len((stage / "written.txt").read_text().split())
    assert 1 <= written < 6
    code, line, _ = walk.qwenlib(*arguments)
    assert code == 0
    assert line["stages"]["02_second"]["metrics"] == straight["stages"]["02_second"]["metrics"]
    source = (stage / "notebook.ipynb").read_text()
    assert f"begins at step {json.loads((stage / 'state/last.json').read_text())[0]}" not in source
    assert "begins at step 0" not in source, "it started again from the beginning"
    rows = (stage / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_plain_papermill_builds_the_missing_input(walk):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "notebooks/02_second.ipynb", "out.ipynb", "-p", "seed",
         "1", "-p", "max_steps", "2"],
        env=walk.env, cwd=walk.root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "02_second needs 01_first, which is missing here" in (walk.root / "out.ipynb").read_text()
    )
    assert walk.results("01_first")["parameters"]["seed"] == 1
    assert walk.results("02_second")["parameters"]["max_steps"] == 2
