"""README: its commands are real, its numbers are those of the records."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = os.environ.get("QWENLIB_RUN")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split("#")[0].strip().removeprefix("exec ") for line in text.splitlines()]
    return [line for line in lines if line]


def qwenlib_commands() -> list[str]:
    return [c for c in commands() if c.startswith(".venv/bin/qwenlib")]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in commands() if c.startswith("make ")]
    assert {"walkthrough", "test", "lab"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"


@pytest.mark.parametrize("command", qwenlib_commands())
def test_qwenlib_commands_are_accepted(command, tmp_path):
    words = shlex.split(command)[1:]
    if words[0] in ("report", "chat", "verify", "bench"):
        # They need a finished run, a download or a minute; tests of their own use them.
        words = [words[0], "--help"]
    elif words[0] == "run" and "--dry-run" not in words:
        words.append("--dry-run")
    elif words[0] == "train-tokenizer":
        # On a file of its own, and small.
        text = tmp_path / "texts.jsonl"
        text.write_text('{"text": "the theme of the thesis, the other theory "}\n' * 3)
        values = {
            "texts/*.jsonl": text, "16384": "285", "my-tokenizer": tmp_path / "out",
            "my-tokenizer.state": tmp_path / "state",
        }  # fmt: skip
        words = [str(values.get(word, word)) for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "qwenlib", *words], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_papermill_parameters_exist():
    from qwenlib import stages

    (command,) = [c for c in commands() if "papermill" in c]
    words = shlex.split(command)
    notebook = Path(words[1])
    assert (ROOT / notebook).is_file()
    known = stages.notebook_parameters(ROOT / notebook)
    given = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
    assert given and set(given) <= set(known)


@pytest.mark.skipif(not RUN, reason="needs a finished walk: set QWENLIB_RUN to its folder")
def test_python_block_runs(capsys):
    code = blocks("python")[0].replace("runs/walkthrough", RUN)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.network
def test_tokenizer_block_runs(capsys):
    from qwenlib.assets import AssetError

    code = blocks("python")[1]
    try:
        exec(compile(code, "README.md", "exec"), {})
    except AssetError as error:
        pytest.skip(f"the real vocabulary cannot be fetched: {str(error).splitlines()[0]}")
    assert capsys.readouterr().out == "naïve 😀\n"


@pytest.mark.slow
def test_training_on_several_processes_runs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(blocks("python")[2])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout.split()[-1]) < 8


def recorder():
    spec = importlib.util.spec_from_file_location(
        "record_results", ROOT / "tools" / "record_results.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_tables_are_those_of_the_records(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert recorder().filled(text) == text, "run python tools/record_results.py tables"


def test_pictures_exist():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
