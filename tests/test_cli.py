"""The command line: refusals before a kernel starts, dry runs, tables, exit codes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwenlib import stages
from qwenlib.cli import app

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = stages.chapter_names()


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the command in a folder of its own; no kernel may start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENLIB_NOTEBOOKS", str(ROOT / "notebooks"))
    from qwenlib.batch import runner

    def no_kernel(*args, **kwargs):
        raise RuntimeError("a kernel was started")

    monkeypatch.setattr(runner, "_papermill", no_kernel)

    def run(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return run


def have_notebook(name):
    return stages.find_notebook(name) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "sed=1"], "unknown parameter 'sed'.*did you mean 'seed'"),
        (["-p", "seed=ten"], "'seed': expected int, got 'ten'"),
        (["-p", "profile=tyni"], "did you mean 'tiny'"),
        (["-p", "seed=1", "--seed", "2"], "'seed' is given twice"),
        (["-f", "absent.yaml"], "No such file"),
        (["-p", "seed"], "expected name=value"),
    ],
)
def test_bad_parameters_exit_with_2_before_a_kernel_starts(call, tmp_path, arguments, message):
    done = call("run", "00", *arguments)
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.exit_code == 2 and line["ok"] is False
    assert re.search(message, line["error"])
    assert not list(tmp_path.iterdir())


def test_an_unknown_chapter_exits_with_2(call):
    assert call("run", "99").exit_code == 2
    assert call("params", "99").exit_code == 2


def test_no_notebooks_exits_with_3(call, monkeypatch, tmp_path):
    monkeypatch.setenv("QWENLIB_NOTEBOOKS", str(tmp_path / "absent"))
    done = call("run", "all")
    assert done.exit_code == 3 and "QWENLIB_NOTEBOOKS" in done.output


@pytest.mark.parametrize("profile", ["tiny", "small", "full", "smoke"])
@pytest.mark.parametrize("name", CHAPTERS)
def test_dry_run_prints_settings_and_resources_and_writes_nothing(call, tmp_path, name, profile):
    if not have_notebook(name):
        pytest.skip(f"{name} has no notebook yet")
    done = call("run", name, "--profile", profile, "--dry-run")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout.strip().splitlines()[-1])["stages"][name]
    assert plan["status"] == "planned"
    assert {"devices", "memory_gb", "hours"} <= set(plan["resources"])
    for key in stages.load_chapter(name).tables[profile]:
        assert key in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CHAPTERS)
def test_params_lists_the_tagged_cell(call, name):
    if not have_notebook(name):
        pytest.skip(f"{name} has no notebook yet")
    done = call("params", int(name[:2]))
    assert done.exit_code == 0
    for parameter in stages.notebook_parameters(stages.find_notebook(name)).values():
        assert parameter.help, f"{name}: {parameter.name} has no help comment"
        assert parameter.name in done.stdout


def test_list_names_every_chapter(call):
    done = call("list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in CHAPTERS if have_notebook(name))


def test_report_of_a_folder_that_does_not_exist_exits_with_2(call):
    assert call("report", "runs/absent").exit_code == 2


def test_chat_with_no_model_folder_says_so(call):
    done = call("chat", "absent")
    assert done.exit_code == 2 and "absent" in done.output


def test_importing_the_command_line_is_fast_and_light():
    code = (
        "import time, sys; t = time.perf_counter(); import qwenlib.cli; "
        "print(time.perf_counter() - t, *{'torch', 'papermill', 'transformers'} & {*sys.modules})"
    )
    best = 9.0
    for _ in range(3):  # the fastest of three: the machine may be busy
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        seconds, *heavy = done.stdout.split()
        assert not heavy
        best = min(best, float(seconds))
        time.sleep(0.1)
    assert best < 0.5
