"""The history's file: exact numbers, cut where a run is taken up, whole after a kill."""

import json
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from qwenlib.training.history import History

ROWS = [{"step": s, "loss": math.pi / s, "note": "ü"} for s in range(1, 7)]


def written(folder) -> Path:
    file = Path(folder) / "state" / "history.jsonl"
    history = History(file)
    history.add_evaluation({"step": 0, "loss": 1 / 3})
    for row in ROWS:
        history.add(row)
        if row["step"] in (4, 6):
            history.add_evaluation({"step": row["step"], "loss": 0.1})
    history.sync()
    return file


def test_a_run_taken_up_keeps_its_lines_and_cuts_the_rest():
    with tempfile.TemporaryDirectory() as folder:
        file = written(folder)
        for _ in range(2):  # and once more, from the same state
            again = History(file, 4)
            assert again.rows == ROWS[:4], "to the last bit"
            assert [row["step"] for row in again.evaluations] == [0, 4]
            again.add({"step": 5, "loss": 7.0})
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in lines if "step" in row] == [1, 2, 3, 4, 5]
    assert [row["evaluation"]["step"] for row in lines if "evaluation" in row] == [0, 4]


def test_half_a_line_is_no_line(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text()[:-20])  # the last evaluation is torn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert History(file, 6).rows == ROWS
    text = file.read_text()
    assert text.endswith("}\n") and len(text.splitlines()) == 6 + 2


def test_lost_lines_are_told_of_and_do_not_stop_the_run(tmp_path):
    file = written(tmp_path)
    with pytest.warns(UserWarning, match="6 of the 9 steps"):
        assert len(History(file, 9).rows) == 6
    file.unlink()
    with pytest.warns(UserWarning, match="0 of the 3 steps"):
        assert History(file, 3).rows == []


def test_a_new_run_begins_a_new_file_and_readers_leave_it_alone(tmp_path):
    file = written(tmp_path)
    before = file.read_bytes()
    reader = History(file, 4, write=False)
    reader.add({"step": 5})
    reader.sync()
    assert len(reader.rows) == 5 and file.read_bytes() == before
    History(file)
    assert file.read_bytes() == b""


def test_numbers_of_numpy_are_numbers(tmp_path):
    history = History(tmp_path / "h.jsonl")
    history.add({"step": 1, "loss": np.float64(0.1), "norm": math.nan})
    row = History(tmp_path / "h.jsonl", 1).rows[0]
    assert row["loss"] == 0.1 and math.isnan(row["norm"])


def test_without_a_file_nothing_is_written(tmp_path):
    history = History()
    history.add({"step": 1})
    history.add_evaluation({"step": 0})
    history.sync()
    assert history.rows == [{"step": 1}] and not list(tmp_path.iterdir())
