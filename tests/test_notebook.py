"""start / check / log / compare / finish outside a kernel, on a chapter with its own profile."""

import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenlib import notebook, plotting, stages
from qwenlib.stages import MissingInput, ParameterError

PROFILE = """title = "Eight"
needs = {needs}
[tiny]
max_steps = 3        # steps of the loop
learning_rate = 0.5  # size of a step
[small]
max_steps = 30
learning_rate = 0.25
[full]
max_steps = 300
learning_rate = 0.125
[smoke]
max_steps = 1
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty repository with two chapters: 08_sft needs 07_base."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "profiles" / "07_base.toml").write_text(PROFILE.format(needs="[]"))
    (tmp_path / "profiles" / "08_sft.toml").write_text(PROFILE.format(needs='["07_base"]'))
    monkeypatch.setenv("QWENLIB_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.setenv("QWENLIB_NOTEBOOKS", str(tmp_path / "notebooks"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cell(**changes):
    """What globals() holds after a parameters cell: annotated names, some values replaced."""
    namespace = {
        "profile": "tiny", "seed": 0, "device": "cpu", "run_dir": "runs/default",
        "wandb_mode": "disabled", "missing_input": "build", "max_steps": None, "rate": 1.0,
        "__annotations__": {
            "profile": str, "seed": int, "device": str, "run_dir": str, "wandb_mode": str,
            "missing_input": str, "max_steps": int | None, "rate": float,
        },
    }  # fmt: skip
    return namespace | changes


def test_explicit_values_win_over_the_profile_and_none_takes_it(house):
    p = notebook.start("07_base", cell()).params
    assert (p.max_steps, p.learning_rate, p.rate) == (3, 0.5, 1.0)
    p = notebook.start("07_base", cell(max_steps=7, profile="full", rate=2)).params
    assert (p.max_steps, p.learning_rate) == (7, 0.125)
    assert p.rate == 2.0 and isinstance(p.rate, float)
    p = notebook.start("07_base", cell(profile="smoke")).params
    assert (p.max_steps, p.learning_rate) == (1, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "1"}, "'seed': expected int, got '1'"),
        ({"seed": True}, "'seed': expected int, got True"),
        ({"seed": -1}, "'seed': expected 0 or more"),
        ({"max_steps": 1.5}, r"'max_steps': expected int \| None, got 1.5"),
        ({"rate": None}, "'rate': expected float, got None"),
        ({"profile": "tyni"}, "'tyni' is not one of .*did you mean 'tiny'"),
        ({"device": "gpu"}, "'gpu' is not one of auto | cpu | cuda"),
        ({"missing_input": "ask"}, "'ask' is not one of build | stop"),
    ],
)
def test_a_bad_parameter_is_named(house, changes, message):
    with pytest.raises(ParameterError, match=message):
        notebook.start("07_base", cell(**changes))
    assert not (house / "runs").exists()


def test_an_unsupported_annotation_is_named(house):
    bad = cell()
    bad["__annotations__"] = bad["__annotations__"] | {"rate": dict}
    with pytest.raises(ParameterError, match="'rate'.*dict"):
        notebook.start("07_base", bad)


def test_a_parameter_that_does_not_exist_names_the_nearest(house):
    p = notebook.start("07_base", cell()).params
    with pytest.raises(AttributeError, match="did you mean 'learning_rate'"):
        _ = p.lerning_rate
    with pytest.raises(AttributeError, match="fixed after start"):
        p.seed = 3


def test_a_second_start_ignores_annotations_of_later_cells(house):
    namespace = cell()
    notebook.start("07_base", namespace)
    namespace["__annotations__"]["later"] = dict[str, int]
    namespace["later"] = {}
    assert not hasattr(notebook.start("07_base", namespace).params, "later")


def test_start_seeds_python_numpy_and_torch(house):
    import random

    import numpy
    import torch

    def draw(seed):
        notebook.start("07_base", cell(seed=seed))
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    first, second, other = draw(1), draw(1), draw(2)
    assert first == second
    assert all(a != b for a, b in zip(first, other))


def test_finish_records_everything_and_prints_json_last(house, capsys):
    import matplotlib.pyplot as plt
    import torch

    run = notebook.start("07_base", cell(seed=3))
    (run.dir / "model").mkdir()
    (run.dir / "model" / "weights.bin").write_bytes(b"abc")
    run.log({"loss": torch.tensor(2.5)}, step=1)
    run.check("holds", torch.tensor(True), "one is one")
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    run.figure(fig, "line")
    run.compare([{"quantity": "loss", "report": "none", "here": 2.5, "why": "small | tiny"}])
    run.finish({"loss": torch.tensor(2.5), "bad": math.nan}, key_figure="line")
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["ok"] and line["metrics"] == {"loss": 2.5, "bad": None}
    results = json.loads((run.dir / "results.json").read_text())
    assert results["status"] == "done" and results["metrics"]["loss"] == 2.5
    assert results["checks"][0]["passed"] is True
    assert results["figures"] == ["line"] == [results["key_figure"]]
    assert results["parameters"]["seed"] == 3 and results["parameters"]["max_steps"] == 3
    assert results["outputs"]["model/weights.bin"]["bytes"] == 3
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert results["outputs"]["model/weights.bin"]["sha256"] == sha256_of_abc
    assert results["environment"]["device"] == "cpu" and results["seconds"] >= 0
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["peak_memory_mb"] > 10
    assert Image.open(run.dir / "figures" / "line.png").mode == "P"
    assert not plt.get_fignums()
    assert run.history() == [{"step": 1, "loss": 2.5}]


def rendered(draw, **options):
    """PNG of a figure that `draw(ax)` fills."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3), dpi=96)
    draw(ax)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", **options)
    plt.close(fig)
    return buffer.getvalue()


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def curves(ax):
    steps = np.arange(300)
    for i, colour in enumerate(plotting.palette[:5]):
        ax.plot(steps, np.cos(steps / 40) / (i + 1), color=colour, alpha=0.8, label=f"run {i}")
    ax.legend()


def heat_map(ax):
    """A smooth field: the first place where too few colours show, as bands."""
    x, y = np.meshgrid(np.linspace(-2, 2, 400), np.linspace(-2, 2, 300))
    ax.imshow(np.exp(-(x**2) - y**2 / 2) + x / 9, cmap="viridis", interpolation="bilinear")


@pytest.mark.parametrize("draw", [curves, heat_map])
def test_figures_are_stored_in_few_colours_without_visible_loss(draw):
    full = rendered(draw)
    small = plotting.small_png(full)
    assert len(small) < 0.5 * len(full)
    change = np.abs(pixels(small) - pixels(full))
    assert change.max() <= plotting.MAX_CHANGE and change.mean() < 0.5
    before, after = (Image.open(io.BytesIO(png)) for png in (full, small))
    assert after.size == before.size
    assert after.info["dpi"] == pytest.approx(before.info["dpi"], abs=0.1)


def test_a_figure_that_256_colours_would_spoil_stays_as_it_is():
    noise = np.random.default_rng(0).random((64, 64, 3))
    for full in (
        rendered(lambda ax: ax.imshow(noise, interpolation="bicubic")),  # every colour there is
        rendered(curves, transparent=True),
    ):
        assert plotting.small_png(full) == full


def test_a_failed_check_raises_and_the_stage_is_not_done(house):
    run = notebook.start("07_base", cell())
    with pytest.raises(AssertionError, match="check 'small' failed: 2 < 1"):
        run.check("small", 2 < 1, "2 < 1")
    assert json.loads((run.dir / "results.json").read_text())["status"] == "failed"
    assert stages.finished(house / "runs/default", "07_base") is None


def test_quality_checks_bind_except_under_smoke(house, capsys):
    run = notebook.start("07_base", cell(profile="smoke"))
    run.check("good", False, "accuracy 0.1", quality=True)
    assert "not enforced" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        run.check("plumbing", False, "files are there")
    run = notebook.start("07_base", cell())
    with pytest.raises(AssertionError):
        run.check("good", False, "accuracy 0.1", quality=True)


def test_a_missing_key_figure_or_column_is_an_error(house):
    run = notebook.start("07_base", cell())
    with pytest.raises(ValueError, match="no figure 'lines'"):
        run.finish({}, key_figure="lines")
    with pytest.raises(ValueError, match="quantity"):
        run.compare([{"quantity": "loss", "here": 1}])


def finish(house, **changes):
    run = notebook.start("07_base", cell(**changes))
    (run.dir / "model.bin").write_bytes(b"weights")
    (run.dir / "state").mkdir(exist_ok=True)
    (run.dir / "state" / "step").write_text("3")
    run.finish({"m": 1})
    return run


def test_missing_input_stop_gives_the_exact_command(house):
    command = "qwenlib run 07_base --profile tiny --seed 5 --run-dir runs/default"
    with pytest.raises(MissingInput, match=command):
        notebook.start("08_sft", cell(missing_input="stop", seed=5))


def test_input_is_the_finished_stage_and_only_a_declared_one(house):
    finish(house)
    run = notebook.start("08_sft", cell(missing_input="stop"))
    assert run.input("07_base") == house / "runs/default/07_base"
    with pytest.raises(MissingInput, match="'06_x' is not among the needs"):
        run.input("06_x")


def test_a_stage_whose_files_were_deleted_is_not_finished(house):
    run = finish(house)
    assert stages.finished(run.run_dir, "07_base")
    (run.dir / "model.bin").unlink()
    assert stages.finished(run.run_dir, "07_base") is None


def test_equal_fingerprint_keeps_state_and_another_one_sets_it_aside(house):
    run = finish(house)
    again = notebook.start("07_base", cell(wandb_mode="offline"))
    assert (again.dir / "state" / "step").exists() and (again.dir / "results.json").exists()
    other = notebook.start("07_base", cell(max_steps=9))
    assert not (other.dir / "state").exists() and not (other.dir / "results.json").exists()
    assert not (other.dir / "model.bin").exists()
    kept = house / "runs/default/.previous/07_base"
    assert (kept / "model.bin").read_bytes() == b"weights"
    (other.dir / "state").mkdir()
    notebook.start("07_base", cell(max_steps=10))
    assert not (run.dir / "state").exists()
    assert (kept / "model.bin").exists(), "an unfinished run must not push out a finished one"


def fingerprint(house, chapter="07_base", **changes):
    namespace = cell(**changes)
    types = {k: stages.ParameterType.parse(v) for k, v in namespace["__annotations__"].items()}
    values = {key: namespace[key] for key in types}
    resolved = stages.resolve(chapter, values, types)
    return stages.fingerprint(resolved, house / "runs" / "default")[0]


def write_notebook(house, code, name="07_base", tags=()):
    cells = [{"cell_type": "code", "metadata": {"tags": list(tags)}, "source": code}]
    (house / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))


def test_fingerprint_follows_what_decides_the_result(house):
    base = fingerprint(house)
    assert base == fingerprint(house, run_dir="elsewhere", wandb_mode="online", device="auto")
    assert base == fingerprint(house, max_steps=3), "the profile's own value, given by hand"
    assert base != fingerprint(house, max_steps=4)
    assert base != fingerprint(house, seed=1)
    write_notebook(house, "x = 1")
    with_code = fingerprint(house)
    write_notebook(house, "x = 2")
    assert len({base, with_code, fingerprint(house)}) == 3
    write_notebook(house, "x = 2", tags=["exercise"])
    assert fingerprint(house) == base


def test_fingerprint_follows_the_library_rooms_a_notebook_imports(house, tmp_path, monkeypatch):
    package = tmp_path / "pkg"
    for name, text in {
        "model/__init__.py": "", "model/net.py": "from ..kernels import norm",
        "kernels/__init__.py": "norm = 1", "data/__init__.py": "", "plotting.py": "",
    }.items():  # fmt: skip
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(stages, "PACKAGE", package)

    def now(code):
        stages._room.cache_clear()
        return stages.library_hash([code])

    code = "def f():\n    from qwenlib.model import net\nfrom qwenlib import plotting"
    before = now(code)
    (package / "data" / "__init__.py").write_text("changed = 1")
    (package / "plotting.py").write_text("changed = 1")
    assert now(code) == before
    (package / "kernels" / "__init__.py").write_text("norm = 2")
    assert now(code) != before
    stages._room.cache_clear()


def test_fingerprint_follows_the_files_of_the_input(house):
    finish(house)
    before = fingerprint(house, "08_sft")
    path = house / "runs/default/07_base/results.json"
    results = json.loads(path.read_text())
    results["outputs"]["model.bin"]["sha256"] = "0" * 64
    path.write_text(json.dumps(results))
    assert fingerprint(house, "08_sft") != before


def test_a_resumed_run_replaces_the_steps_it_repeats(house):
    run = notebook.start("07_base", cell())
    for step in (1, 2, 3):
        run.log({"loss": step}, step=step)
    run.log({"accuracy": 0.5}, step=3)
    with (run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    run = notebook.start("07_base", cell())
    run.log({"loss": 30}, step=3)
    run.log({"loss": 40}, step=4)
    losses = [(row["step"], row["loss"]) for row in run.history() if "loss" in row]
    assert losses == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert {"step": 3, "accuracy": 0.5} in run.history()


def test_wandb_offline_writes_inside_the_run_folder(house, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(house / "elsewhere"))
    run = notebook.start("07_base", cell(wandb_mode="offline"))
    run.log({"loss": 1.0}, step=0)
    run.finish({"loss": 1.0})
    assert list((run.dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "wandb" not in str(list(json.loads((run.dir / "results.json").read_text())["outputs"]))


def test_wandb_failing_warns_once_and_the_run_goes_on(house, monkeypatch):
    import wandb

    def broken(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(wandb, "init", broken)
    run = notebook.start("07_base", cell(wandb_mode="offline"))
    with pytest.warns(UserWarning, match="no space") as seen:
        run.log({"loss": 1.0}, step=0)
        run.log({"loss": 1.0}, step=1)
    assert len(seen) == 1
    run.finish({"loss": 1.0})
    assert run.history()[-1]["step"] == 1


def test_show_prints_the_library_source(capsys):
    notebook.show(notebook.versions)
    shown = capsys.readouterr().out
    assert "def versions(" in shown and "qwenlib/notebook.py" in shown


def test_cuda_without_a_gpu_is_refused(house):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ParameterError, match="sees no GPU"):
        notebook.start("07_base", cell(device="cuda"))


def test_a_relative_run_dir_inside_notebooks_starts_at_the_repository_root(house, monkeypatch):
    assert stages.resolve_run_dir("runs/x") == house / "runs/x"
    monkeypatch.chdir(house / "notebooks")
    assert stages.resolve_run_dir("runs/x") == house / "runs/x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_steps = 30\n", ""), r"\[small\] and \[tiny\] differ in \['max_steps'\]"),
        (("[smoke]\n", "[smoke]\nmax_step = 1\n"), r"\[smoke\] has keys.*max_step"),
        (("[full]", "[huge]"), r"table \[full\] is missing"),
    ],
)
def test_profiles_are_checked(house, change, message):
    text = PROFILE.format(needs="[]")
    assert change[0] in text
    (house / "profiles" / "07_base.toml").write_text(text.replace(*change))
    with pytest.raises(ParameterError, match=message):
        stages.load_chapter("07_base")


def test_importing_notebook_is_light():
    code = "import sys, qwenlib.notebook; print(*{'torch', 'matplotlib', 'wandb'} & {*sys.modules})"
    root = Path(importlib.util.find_spec("qwenlib").origin).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == ""
