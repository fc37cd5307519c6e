"""A walk of four tiny chapters in a temporary folder: 01 -> 02 -> 04, and 03 on its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PARAMETERS = """profile: str = "tiny"  # tiny | small | full
seed: int = 0  # every random choice follows from it
device: str = "auto"  # auto | cpu | cuda
run_dir: str = "runs/default"  # run folder
wandb_mode: str = "disabled"  # offline | online | disabled
missing_input: str = "build"  # build a missing stage, or stop
"""

PROFILE = """title = "{title}"
needs = {needs}

[tiny]
max_steps = 3          # steps of the loop
learning_rate = 0.5    # size of a step

[small]
max_steps = 30         # steps of the loop
learning_rate = 0.25   # size of a step

[full]
max_steps = 300        # steps of the loop
learning_rate = 0.125  # size of a step

[smoke]
max_steps = 1

[resources]
tiny = {{devices = "2 CPU cores", memory_gb = 1, hours = 0.1}}
small = {{devices = "1 x GPU 24GB", memory_gb = 20, hours = 2}}
full = {{devices = "8 x H100 80GB", memory_gb = 70, hours = 20}}
"""

KNOBS = {
    "01_first": "max_steps: int | None = None  # steps (None: the profile's)\n",
    "02_second": "max_steps: int | None = None  # steps (None: the profile's)\n"
    "learning_rate: float | None = None  # size of a step (None: the profile's)\n"
    "pause: float = 0.0  # seconds a step takes\n",
    "03_other": "fail: bool = False  # whether the check fails\n",
    "04_last": "",
}
NEEDS = {"01_first": [], "02_second": ["01_first"], "03_other": [], "04_last": ["02_second"]}

# A loop that keeps its state in run.dir/state and goes on from it, as a training loop does.
SECOND = """import json, os, time
state = run.dir / "state" / "last.json"
first = json.loads((run.input("01_first") / "number.json").read_text())
step, total = json.loads(state.read_text()) if state.exists() else (0, first)
print("begins at step", step)
while step < p.max_steps:
    step, total = step + 1, total * (1 + p.learning_rate)
    run.log({"total": total}, step=step)
    with open(run.dir / "written.txt", "a") as file:
        file.write(f"{step}\\n")
    stages.write_json(state, [step, total])
    time.sleep(p.pause)
(run.dir / "written.txt").unlink()
"""
BODY = {
    "01_first": "import random\nnumber = random.random() + p.max_steps\n"
    '(run.dir / "number.json").write_text(str(number))\nmetrics = {"number": number}\n',
    "02_second": SECOND + 'metrics = {"total": total}\n',
    "03_other": 'metrics = {"one": 1}\nrun.check("works", not p.fail, "asked to fail or not")\n',
    "04_last": "import json, matplotlib.pyplot as plt\n"
    'run.input("02_second")\nfig, ax = plt.subplots()\nax.plot([1, 2])\n'
    'run.figure(fig, "line")\nmetrics = {"two": 2.0}\n'
    'run.compare([{"quantity": "two", "report": 2, "here": 2.0, "why": "same"}])\n',
}


def cell(source: str, *tags: str) -> dict:
    return {
        "cell_type": "code", "id": f"c{abs(hash(source)) % 10**8}", "metadata": {"tags": [*tags]},
        "source": source, "outputs": [], "execution_count": None,
    }  # fmt: skip


def write_notebook(path: Path, cells: list[dict]) -> None:
    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {path.stem}"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.write_text(
        json.dumps(
            {
                "cells": [title, *cells],
                "metadata": {"kernelspec": kernel},
                "nbformat": 4,
                "nbformat_minor": 5,
            }  # fmt: skip
        )
    )


class Walk:
    """The temporary repository: `root/notebooks`, `root/profiles`, `root/runs`."""

    def __init__(self, root: Path):
        self.root = root
        self.runs = root / "runs"
        (root / "notebooks").mkdir()
        (root / "profiles").mkdir()
        for name, needs in NEEDS.items():
            text = PROFILE.format(title=name[3:].title(), needs=json.dumps(needs))
            (root / "profiles" / f"{name}.toml").write_text(text)
            self.write(name, BODY[name])

    def write(self, name: str, body: str) -> None:
        write_notebook(
            self.root / "notebooks" / f"{name}.ipynb",
            [
                cell(PARAMETERS + KNOBS[name], "parameters"),
                cell(
                    "from qwenlib import notebook, stages\n"
                    f'run = notebook.start("{name}", globals())\np = run.params'
                ),
                cell(body, "check"),
                cell("run.finish(metrics)", "results"),
            ],
        )

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "QWENLIB_NOTEBOOKS": str(self.root / "notebooks"),
            "QWENLIB_PROFILES": str(self.root / "profiles"),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "qwenlib", *map(str, arguments)]

    def qwenlib(self, *arguments: object) -> tuple[int, dict, str]:
        """Run the command; returns its exit code, the JSON of its last line, and stderr."""
        done = subprocess.run(
            self.command(*arguments), env=self.env, cwd=self.root, capture_output=True, text=True
        )
        lines = done.stdout.strip().splitlines()
        try:
            last = json.loads(lines[-1]) if lines else {}
        except ValueError:
            last = {"text": done.stdout}
        return done.returncode, last, done.stderr

    def results(self, name: str, run: str = "default") -> dict:
        return json.loads((self.runs / run / name / "results.json").read_text())


@pytest.fixture
def walk(tmp_path, monkeypatch) -> Walk:
    made = Walk(tmp_path)
    monkeypatch.setenv("QWENLIB_NOTEBOOKS", str(tmp_path / "notebooks"))
    monkeypatch.setenv("QWENLIB_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.chdir(tmp_path)
    return made
