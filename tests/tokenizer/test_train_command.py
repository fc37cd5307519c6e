"""`qwenlib train-tokenizer` and the files it reads."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from qwenlib.cli import app
from qwenlib.tokenizer import Tokenizer, text_files, train_bpe
from qwenlib.tokenizer.text_files import read_texts
from tests.tokenizer.conftest import CODE, LANGUAGES
from tests.tokenizer.test_trainer import naive_counts

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [CODE, *LANGUAGES.values(), "one\r\n\r\ntwo \n\n three", "", "e\u0301 🙂"]


def write(path, texts=TEXTS, column="text"):
    rows = [json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)]
    if path.name.endswith(".txt"):
        path.write_bytes("".join(texts).encode())
    elif path.name.endswith(".jsonl"):
        path.write_text("\n".join(rows))  # with empty lines
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress("".join(rows).encode()))
    else:
        table = pa.table({"id": range(len(texts)), column: texts})
        parquet.write_table(table, path, row_group_size=5)
    return path


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = CliRunner().invoke(app, ["train-tokenizer", *map(str, arguments)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done, json.loads(done.stdout.strip().splitlines()[-1])

    return run


@pytest.mark.parametrize("kind", text_files.KINDS)
def test_texts_come_back(kind, tmp_path):
    path = write(tmp_path / f"texts{kind}")
    got = list(read_texts([path, path]))
    if kind == ".txt":
        assert "".join(got) == "".join(TEXTS * 2)
    else:
        assert got == TEXTS * 2
        write(path, column="content")
        assert list(read_texts([path], "content")) == TEXTS


@pytest.mark.parametrize("block", [1, 2, 3, 7, 50, 1000])
def test_a_long_file_comes_in_pieces_of_the_same_pretokens(block, tmp_path, monkeypatch):
    """Characters, line ends and runs of white space may lie across the blocks."""
    monkeypatch.setattr(text_files, "_BLOCK", block)
    path = write(tmp_path / "a.txt", TEXTS * 3)
    pieces = list(read_texts([path]))
    assert "".join(pieces) == "".join(TEXTS * 3)
    assert naive_counts(pieces) == naive_counts(["".join(TEXTS * 3)])
    assert len(pieces) > 3 or block == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt: byte 3 is no UTF-8"),
        ("a.txt", b"x" * 10 + b"\xe4\xbd", r"a\.txt: byte 10 is no UTF-8 \(unexpected end"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: no JSON"),
        ("a.jsonl", b'["a"]\n', r"line 1: a list, no object with 'text'"),
        ("a.jsonl", b'{"body": "a", "n": 1}\n', r"no column 'text', there is body, n: give --col"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: 'text' is no string but NoneType"),
        ("a.jsonl", b'{"text": "a\\ud83d"}\n', r"a\.jsonl, line 1: character 1 is the lone surr"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: the gzip file is damaged"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            r"gzip file is damaged",
        ),
        ("a.parquet", b"no parquet", r"a\.parquet: not readable as Parquet"),
        ("a.csv", b"text\n", r"a\.csv: the name must end with \.txt, \.jsonl"),
        (None, b"", r"absent\.txt is no file"),
    ],
)
def test_bad_files_are_named(name, content, message, call, tmp_path):
    if name is not None:
        (tmp_path / name).write_bytes(content)
    done, line = call(name or "absent.txt", "--out", "out", "--workers", 1)
    assert done.exit_code == 2 and line["ok"] is False
    assert re.search(message, line["error"])
    assert not (tmp_path / "out").exists()


def test_a_parquet_column_is_missing_or_holds_no_text(tmp_path):
    path = write(tmp_path / "a.parquet", column="body")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text', there is id, body"):
        list(read_texts([path]))
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: 'id' is no string but int"):
        list(read_texts([path], "id"))
    parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"row 2: 'text' is no string but NoneType"):
        list(read_texts([path]))


def test_the_folder_holds_the_tokenizer(call, tmp_path):
    files = [write(tmp_path / f"texts{kind}") for kind in text_files.KINDS]
    done, line = call(*files, "--out", "out", "--vocab-size", 400, "--workers", 1)
    assert done.exit_code == 0 and line["ok"] is True
    assert line["vocab_size"] == 400 and line["merges"] == 122 and line["warnings"] == []
    want = train_bpe(list(read_texts(files)), 400)
    assert Tokenizer.from_pretrained("out").merges == want
    assert Tokenizer.from_tiktoken("out/tokenizer.tiktoken").merges == want


def test_a_tokenizer_is_not_overwritten_unasked(call, tmp_path):
    write(tmp_path / "a.txt")
    options = ["a.txt", "--out", "out", "--workers", 1, "--vocab-size"]
    assert call(*options, 300)[0].exit_code == 0
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    done, line = call(*options, 310)
    assert done.exit_code == 2 and "out holds a tokenizer: give --overwrite" in line["error"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    assert call(*options, 310, "--overwrite")[0].exit_code == 0
    assert Tokenizer.from_pretrained("out").vocab_size == 310
    assert len(Tokenizer.from_tiktoken("out/tokenizer.tiktoken").merges) == 310 - 278


def test_options_reach_the_trainer(call, tmp_path):
    write(tmp_path / "a.txt")
    done, line = call("a.txt", "--out", "out", "--vocab-size", 3000, "--min-count", 5)
    assert done.exit_code == 2 and "3000" not in line["error"] and "2978" in line["error"]
    assert call("a.txt", "--out", "out", "--vocab-size", 277)[1]["error"].startswith("vocab_size")
    assert "workers=0" in call("a.txt", "--out", "out", "--workers", 0)[1]["error"]
    assert "memory_mb=0" in call("a.txt", "--out", "out", "--memory-mb", 0)[1]["error"]
    options = ["a.txt", "--out", "out", "--workers", 1, "--state", "state", "--vocab-size", 300]
    assert call(*options)[0].exit_code == 0
    write(tmp_path / "a.txt", TEXTS[1:])
    assert "state belongs to other texts" in call(*options, "--overwrite")[1]["error"]


def test_what_is_left_out_is_said(call, tmp_path):
    rows = [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)} " for i in range(9000)]
    (tmp_path / "a.txt").write_text("".join(rows))
    done, line = call("a.txt", "--out", "out", "--workers", 1, "--vocab-size", 300,
                      "--memory-mb", 1)  # fmt: skip
    assert done.exit_code == 0
    (warning,) = line["warnings"]
    assert "left out of the merges" in warning and warning in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="stops the process by its state folder")
def test_ctrl_c_ends_with_130_and_goes_on(tmp_path):
    """SIGINT to the process and its workers, as a terminal sends it."""
    texts = [f"{i} {CODE}" for i in range(150_000)]  # seconds of work, also for a fast machine
    write(tmp_path / "a.jsonl", texts)
    command = [sys.executable, "-m", "qwenlib", "train-tokenizer", "a.jsonl", "--out", "out",
               "--state", "state", "--vocab-size", "330", "--workers", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):  # on a machine that stood still it may have ended before the signal
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              start_new_session=True) as process:  # fmt: skip
            while process.poll() is None and not (tmp_path / "state" / "settings.json").exists():
                time.sleep(0.001)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=300)
        assert process.returncode in (0, 130), err
        if process.returncode == 130:
            break
    assert process.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["error"].startswith("interrupted; the same command")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Tokenizer.from_pretrained(tmp_path / "out").merges == train_bpe(texts, 330)


def test_folders_are_checked_before_the_work(call, tmp_path):
    texts = write(tmp_path / "a.jsonl")
    done, line = call(texts, "--out", "same", "--state", tmp_path / "same", "--vocab-size", "300")
    assert done.exit_code == 2 and "two folders" in line["error"]
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        done, line = call(texts, "--out", out, "--vocab-size", "300")
        assert done.exit_code == 2 and "is a file" in line["error"]
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "file"]


def test_a_folder_and_capital_endings(call, tmp_path):
    (tmp_path / "d").mkdir()
    done, line = call("d", "--out", "o")
    assert done.exit_code == 2 and "give the files in it" in line["error"]
    path = write(tmp_path / "a.txt")
    path = path.rename(tmp_path / "A.TXT")
    assert "".join(read_texts([path])) == "".join(TEXTS)


def test_bad_utf8_in_parquet_is_named(tmp_path):
    raw = pa.array([b"good", b"bad \xff"], type=pa.binary())
    column = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet"):
        list(read_texts([tmp_path / "a.parquet"]))
