"""tools/: refreshing the committed notebooks, and judging a finished walk."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh_notebooks = load("refresh_notebooks")
check_walk = load("check_walk")


def results(**changes):
    fields = {"status": "done", "profile": "tiny", "checks": [], "error": ""}
    return json.dumps(fields | changes)


@pytest.fixture
def house(tmp_path):
    """A notebook without outputs, and a run folder in which papermill executed it."""
    cells = [
        new_markdown_cell("# Title"),
        new_code_cell("x: int = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("print(x)"),
    ]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "01_toy.ipynb")
    stage = tmp_path / "run" / "01_toy"
    stage.mkdir(parents=True)
    done = nbformat.from_dict(json.loads(json.dumps(new_notebook(cells=cells))))
    done.cells.insert(2, new_code_cell("x = 5", metadata={"tags": ["injected-parameters"]}))
    done.cells[3].outputs = [new_output("stream", name="stdout", text=f"{ROOT}/runs/x 5\n")]
    done.cells[3].metadata["papermill"] = {"duration": 1.0}
    done.metadata["papermill"] = {"input_path": "/somewhere"}
    nbformat.write(done, stage / "notebook.ipynb")
    (stage / "results.json").write_text(results())
    (tmp_path / "run" / "index.html").write_text("<html></html>")
    return tmp_path


def test_refresh_keeps_source_and_takes_outputs(house):
    notebooks = house / "notebooks"
    assert "no outputs" in refresh_notebooks.check(notebooks)[0]
    assert refresh_notebooks.refresh(house / "run", notebooks) == []
    text = (notebooks / "01_toy.ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    assert [c.source for c in notebook.cells] == ["# Title", "x: int = 1", "print(x)"]
    assert notebook.cells[2].outputs[0].text == "runs/x 5\n"
    assert "papermill" not in text and str(ROOT) not in text
    assert refresh_notebooks.check(notebooks) == []


def test_check_finds_code_newer_than_outputs_but_lets_prose_change(house):
    notebooks = house / "notebooks"
    refresh_notebooks.refresh(house / "run", notebooks)
    path = notebooks / "01_toy.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Better title"
    nbformat.write(notebook, path)
    assert refresh_notebooks.check(notebooks) == []
    notebook.cells[2].source = "print(x + 1)"
    nbformat.write(notebook, path)
    assert "newer than its outputs" in refresh_notebooks.check(notebooks)[0]
    assert "has changed since" in refresh_notebooks.refresh(house / "run", notebooks)[0]


@pytest.mark.parametrize("changes", [{"status": "failed"}, {"profile": "smoke"}])
def test_refresh_refuses_another_run(house, changes):
    before = (house / "notebooks" / "01_toy.ipynb").read_text()
    (house / "run" / "01_toy" / "results.json").write_text(results(**changes))
    assert len(refresh_notebooks.refresh(house / "run", house / "notebooks")) == 1
    assert (house / "notebooks" / "01_toy.ipynb").read_text() == before


def test_refresh_refuses_a_large_notebook(house):
    path = house / "run" / "01_toy" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[3].outputs = [new_output("stream", name="stdout", text="x" * 500_000)]
    nbformat.write(notebook, path)
    assert "KB" in refresh_notebooks.refresh(house / "run", house / "notebooks")[0]


def test_walk_that_is_whole_passes(house):
    assert check_walk.problems(house / "run", ["01_toy"]) == []


def test_walk_with_a_fault_is_found(house):
    run = house / "run"
    assert "02_gone: no results.json" in check_walk.problems(run, ["01_toy", "02_gone"])
    (run / "01_toy" / "results.json").write_text(results(status="failed", error="boom"))
    assert check_walk.problems(run, ["01_toy"]) == ["01_toy: failed: boom"]
    bad = [{"name": "loss falls", "passed": False, "text": "it rose"}]
    (run / "01_toy" / "results.json").write_text(results(checks=bad))
    assert check_walk.problems(run, ["01_toy"]) == ["01_toy: check 'loss falls' failed: it rose"]
    (run / "index.html").unlink()
    assert any("index.html" in line for line in check_walk.problems(run, ["01_toy"]))
