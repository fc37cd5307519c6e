"""tools/record_results.py bench: reports joined, recorded and turned into the table of RESULTS."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    path = ROOT / "tools" / "record_results.py"
    spec = importlib.util.spec_from_file_location("record_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("nothing here\n")
    (tmp_path / "RESULTS.md").write_text("a\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nb\n")
    return module


def report(name, **changes):
    row = {
        "name": name, "about": "two rows", "ours": 3000.0, "peer": 1000.4, "unit": "tokens/s",
        "peer_name": "transformers, sdpa", "ratio": 2.96, "ratio_low": 2.5, "ratio_high": 3.25,
        "rounds": 9,
    }  # fmt: skip
    fields = {
        "rows": [row], "device": "cpu", "dtype": "float32", "threads": 2, "bandwidth_gb_s": 30.0,
        "platform": "a CPU, Linux", "versions": {"torch": "2", "transformers": "5"},
        "skipped": {}, "refused": {},
    }  # fmt: skip
    return fields | changes


def files(folder, *reports):
    paths = [folder / f"{i}.json" for i in range(len(reports))]
    for path, value in zip(paths, reports):
        path.write_text(json.dumps(value))
    return [str(path) for path in paths]


def call(tool, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["record_results.py", *arguments])
    tool.main()


def test_two_reports_become_one_record_and_one_table(tool, tmp_path, monkeypatch):
    second = report("train", skipped={"decode-0.5b": "needs a GPU"})
    second["rows"][0]["bandwidth_fraction"] = 0.51
    call(tool, monkeypatch, "bench", *files(tmp_path, report("decode"), second))
    record = json.loads((tmp_path / "records" / "bench_cpu.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["decode", "train"]
    text = (tmp_path / "RESULTS.md").read_text()
    line = "two rows | 3,000 | 1,000 | tokens/s | 2.96 | 2.50 to 3.25 | transformers, sdpa |"
    assert f"| decode | {line}" in text and f"| train | {line}" in text and "old" not in text
    assert "a CPU, Linux, cpu, 2 threads, float32; torch 2, transformers 5." in text
    assert "train reads its weights at 51.0 % of the 30 GB/s of a large copy." in text
    assert "Not measured: decode-0.5b (needs a GPU)." in text
    assert text.startswith("a\n") and text.endswith("b\n")


def test_a_gpu_has_a_record_of_its_own(tool, tmp_path, monkeypatch):
    call(tool, monkeypatch, "bench", *files(tmp_path, report("decode", device="NVIDIA X")))
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["bench_gpu.json"]


def test_training_has_a_record_and_a_table_of_its_own(tool, tmp_path, monkeypatch):
    memory = {"ours_mb": 512.4, "peer_mb": 4096.0, "peer_name": "transformers' Trainer, one batch"}
    loop = report("loop", kind="train", versions={"torch": "2", "transformers": "5",
                                                  "accelerate": "1"})  # fmt: skip
    loop["rows"][0] |= memory
    results = tmp_path / "RESULTS.md"
    results.write_text(results.read_text() + "<!-- train: begin -->\n<!-- train: end -->\n")
    call(tool, monkeypatch, "bench", *files(tmp_path, report("decode", kind="forward"), loop))
    for name, case in (("bench_cpu", "decode"), ("train_cpu", "loop")):
        record = json.loads((tmp_path / "records" / f"{name}.json").read_text())
        assert [row["name"] for row in record["rows"]] == [case]
    text = results.read_text()
    line = "two rows | 3,000 | 1,000 | 2.96 | 2.50 to 3.25 | 512 | 4,096 | one batch |"
    assert f"| loop | {line}" in text and "torch 2, transformers 5, accelerate 1." in text
    call(tool, monkeypatch, "bench", *files(tmp_path, loop))
    assert text == results.read_text(), "the other record stays"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 1}, "differ in threads"),
        ({"versions": {"torch": "2", "transformers": "6"}}, "version of transformers"),
        ({"refused": {"x": "row 1"}}, "outputs differ"),
    ],
)
def test_reports_that_do_not_belong_together_are_refused(
    tool, tmp_path, monkeypatch, changes, message
):
    with pytest.raises(SystemExit, match=message):
        call(tool, monkeypatch, "bench", *files(tmp_path, report("a"), report("b", **changes)))
    assert not (tmp_path / "records").exists()
