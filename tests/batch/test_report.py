"""The HTML report, from records written by hand."""

import json
import os
import re

from qwenlib import stages
from qwenlib.batch import graph, report

PNG = bytes.fromhex("89504e470d0a1a0a")


def record(run_dir, name, **changes):
    results = {
        "stage": name, "status": "done", "error": "", "profile": "tiny", "seconds": 75.0,
        "peak_memory_mb": 512.0, "metrics": {"loss": 1.23456, "by": {"code": 2}},
        "checks": [{"name": "a_check", "passed": True, "text": "1 < 2", "enforced": True}],
        "compare": [{"quantity": "<loss>", "report": "none", "here": 1.23456, "why": "small"}],
        "figures": ["curve", "other"], "key_figure": "curve", "parameters": {"seed": 0},
    }  # fmt: skip
    folder = run_dir / name
    (folder / "figures").mkdir(parents=True)
    for figure in ("curve", "other"):
        (folder / "figures" / f"{figure}.png").write_bytes(PNG)
    (folder / "results.json").write_text(json.dumps(results | changes))


def test_the_page_is_self_contained_and_tells_each_stage(walk):
    run_dir = walk.runs / "r"
    record(run_dir, "01_first")
    record(run_dir, "02_second", status="failed", error="cell 5: <boom>", metrics={})
    page = report.write(run_dir, graph.chapters()).read_text()
    assert "1 of 4 done" in page and "2 of 2 hold" in page
    assert "1.235" in page and "by · code" in page and "1 min 15 s" in page
    assert page.count("data:image/png;base64,") == 4
    assert "&lt;loss&gt;" in page and "<loss>" not in page and "&lt;boom&gt;" in page
    assert page.count(">not run</em>") == 4  # two stages, in the table and in their section
    assert not re.search(r"(src|href)='https?:", page) and "<script" not in page


def test_stage_status_from_its_records(walk):
    stage = walk.runs / "r" / "01_first"
    assert report.status_of(stage) == "missing"
    stage.mkdir(parents=True)
    (stage / "started.json").write_text(json.dumps({"pid": 2**22 + 1, "pid_started": "1"}))
    assert report.status_of(stage) == "interrupted"
    (stage / "results.json").write_text('{"status": "preempted"}')
    assert report.status_of(stage) == "preempted"
    mark = stages.process_started(os.getpid())
    (stage / "started.json").write_text(json.dumps({"pid": os.getpid(), "pid_started": mark}))
    assert report.status_of(stage) == "running"
    (stage / "results.json").write_text('{"status": "done"}')
    assert report.status_of(stage) == "done"


def test_notebooks_become_html_once(walk):
    stage = walk.runs / "r" / "01_first"
    stage.mkdir(parents=True)
    (stage / "notebook.ipynb").write_text((walk.root / "notebooks/01_first.ipynb").read_text())
    html = report.export_notebook(stage)
    assert "random.random" in re.sub(r"<[^>]+>", "", html.read_text())
    first = html.stat().st_mtime_ns
    assert report.export_notebook(stage).stat().st_mtime_ns == first


def test_a_broken_notebook_does_not_stop_a_run(walk, capsys):
    stage = walk.runs / "r" / "01_first"
    stage.mkdir(parents=True)
    (stage / "notebook.ipynb").write_text("half a file")
    report.update(walk.runs / "r", graph.chapters(), "01_first")
    assert "report could not be written" in capsys.readouterr().err
