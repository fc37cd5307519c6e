"""Counting pre-tokens: exact, in processes, in bounded memory, after any interruption."""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlib.tokenizer import pretokens, train_bpe
from qwenlib.tokenizer.bpe import pretokenize
from qwenlib.tokenizer.pretokens import count_pretokens
from tests.tokenizer.test_trainer import CORPUS, ROOT, naive_counts, thorough


def test_counts_of_texts(monkeypatch):
    monkeypatch.setattr(pretokens, "CHUNK_BYTES", 1 << 14)
    texts = [*CORPUS, "x" * 50, "", "e\u0301 \u1100\u1161", "\n".join(CORPUS) * 4]
    want = naive_counts(texts)
    for workers in (1, 2, 3):
        assert count_pretokens(iter(texts), workers) == want


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_both_ways_to_start_workers(method, monkeypatch):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(pretokens, "process_context", lambda: context)
    assert count_pretokens(CORPUS, 2) == naive_counts(CORPUS)


def test_one_worker_is_no_process(monkeypatch):
    monkeypatch.setattr(pretokens, "ProcessPoolExecutor", None)
    assert count_pretokens(CORPUS, 1) == naive_counts(CORPUS)


def test_a_killed_worker_is_told(monkeypatch):
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(pretokens, "process_context", lambda: context)
    monkeypatch.setattr(pretokens, "prepare_worker", lambda: os._exit(9))
    with pytest.raises(RuntimeError, match="fewer workers"):
        count_pretokens(CORPUS, 2)


pieces = st.sampled_from([*"ab Z19\n\r\t'.,-é你", " ", "\n", "'s", "\u0301", "\u0327", "\u1161",
                          "\u1100", "\u2003", "\u0085", "🙂", "  \n", "'ſ"])  # fmt: skip


@thorough
@given(st.lists(pieces, max_size=30).map("".join), st.integers(1, 5))
def test_a_cut_changes_no_pretoken(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokens, "PIECE_CHARS", size)
        cut = list(pretokens._cut(text))
    assert "".join(piece for _, piece in cut) == text
    assert all(text[start:].startswith(piece) for start, piece in cut)
    assert [w for _, piece in cut for w in pretokenize(piece)] == pretokenize(text)
    at = pretokens.last_cut(text)
    if at is not None:
        assert pretokenize(text[:at]) + pretokenize(text[at:]) == pretokenize(text)


def test_long_texts_are_cut():
    text = "All human beings are born free.\nAnd equal.\n" * 2000
    cut = list(pretokens._cut(text))
    assert max(len(piece) for _, piece in cut) < pretokens.PIECE_CHARS + 40


def test_a_lone_surrogate_is_named():
    with pytest.raises(ValueError, match=r"text 2: character 10,004 .*'\\ud83d'.*repair"):
        count_pretokens(["fine", "a b\n" * 2501 + "\ud83d"])


def test_texts_must_be_strings():
    with pytest.raises(TypeError, match="text 2 is no str but bytes"):
        count_pretokens(["fine", b"bytes"])
    for name in ("workers", "memory_mb", "max_words"):
        with pytest.raises(ValueError, match=f"{name}=0 is below 1"):
            count_pretokens(["fine"], **{"workers": 1, name: 0})


# --- bounded memory


def many_words(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count // 50):
        yield " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(50))


def test_spilled_counts_are_exact(monkeypatch):
    """Files of one level, of two, and merged in two rounds at the end."""
    monkeypatch.setattr(pretokens, "FILES_MERGED", 3)
    texts = list(many_words(60_000))
    want, made = naive_counts(texts), []
    write = pretokens._Files._write

    def spy(self, first, end, level, *others):
        made.append(level)
        write(self, first, end, level, *others)

    monkeypatch.setattr(pretokens._Files, "_write", spy)
    for workers in (1, 2):
        assert count_pretokens(texts, workers, memory_mb=1, max_words=10**9) == want
    assert made.count(0) > 9 and made.count(1) > 3 and 2 in made and made[-1] == -1


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("max_words", [1, 7, 500, 4000, 10**6])
def test_max_words_keeps_the_most_frequent(max_words, spilled):
    texts = list(many_words(30_000, seed=1))
    want = naive_counts(texts)
    kept = dict(sorted(want.items(), key=lambda item: (-item[1], item[0]))[:max_words])
    got = count_pretokens(texts, max_words=max_words, memory_mb=1 if spilled else None)
    assert got == kept
    assert got.left_out_words == len(want) - len(kept)
    assert got.left_out == want.total() - sum(kept.values())
    assert got.left_out_share == pytest.approx(got.left_out / want.total())


def test_what_is_left_out_is_told():
    with pytest.warns(UserWarning, match=r"left out of the merges: only 20 distinct"):
        train_bpe(CORPUS, 290, max_words=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_bpe(CORPUS, 290, max_words=10**6)


MEMORY = """
import random, resource, sys
from qwenlib.tokenizer import train_bpe, trainer
if trainer._library() is None: print("no compiler"); sys.exit()
def words(count):
    rng = random.Random(0)
    for _ in range(count // 100):
        yield " ".join("%x" % rng.getrandbits(60) for _ in range(100)).translate(LETTERS)
LETTERS = str.maketrans("0123456789", "ghijklmnop")
train_bpe(words(1000), 300)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (150 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    print(len(train_bpe(words(1_000_000), 600, memory_mb=MEMORY_MB)))
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
@pytest.mark.parametrize(("memory_mb", "outcome"), [("40", "322"), ("None", "MemoryError")])
def test_a_million_words_in_40_mb(memory_mb, outcome):
    code = MEMORY.replace("MEMORY_MB", memory_mb)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    if "no compiler" in done.stdout:
        pytest.skip("the compiled merges are measured")
    assert done.stdout.split() == [outcome], done.stderr


# --- killed and resumed

STATE_TEXTS = list(many_words(20_000, seed=2))


SMALL = {"CHUNK_BYTES": 4000, "SAVE_CHUNKS": 2, "FILES_MERGED": 3}


@pytest.fixture
def small_chunks(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(pretokens, name, value)


def all_kinds_of_stops(texts, state, stop):
    """Train with a state folder; `stop(n)` is asked after each of the n-th calls of progress."""
    calls = itertools.count(1)

    def progress(phase, done, total):
        if stop(next(calls)):
            raise KeyboardInterrupt

    return train_bpe(texts, 330, progress, state_dir=state)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8, 13, 21, 25, 26, 40, 60])
def test_stopped_and_resumed(stop, tmp_path, small_chunks):
    want = train_bpe(STATE_TEXTS, 330)
    with pytest.raises(KeyboardInterrupt):
        all_kinds_of_stops(STATE_TEXTS, tmp_path, lambda n: n == stop)
    counted = []
    count = pretokens._count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokens, "_count", lambda pieces: counted.append(1) or count(pieces))
        assert train_bpe(STATE_TEXTS, 330, state_dir=tmp_path) == want
    chunks = sum(1 for _ in pretokens._chunks(STATE_TEXTS, pretokens.CHUNK_BYTES))
    saved = (min(stop, chunks) - 1) // 2 * 2
    assert len(counted) <= chunks - saved, "what was saved is not counted again"


KILLED = """
import itertools, os, signal, sys
from qwenlib.tokenizer import pretokens, train_bpe
from tests.tokenizer.test_pretokens import SMALL, STATE_TEXTS
for name, value in SMALL.items():
    setattr(pretokens, name, value)
calls, stop = itertools.count(1), int(sys.argv[2])
def progress(phase, done, total):
    if next(calls) == stop:
        print(phase, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    train_bpe(STATE_TEXTS, 330, progress, state_dir=sys.argv[1], workers=2)
"""


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, small_chunks):
    """SIGKILL while counting and while merging, of the process and so of its workers."""
    script, state = tmp_path / "killed.py", tmp_path / "state"
    script.write_text(KILLED)
    phases = []
    for stop in (3, 11, 24, 30, 60):
        done = subprocess.run(
            [sys.executable, str(script), str(state), str(stop)], cwd=tmp_path, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, timeout=60,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        phases.append(done.stdout.strip())
    assert phases[0] == "read" and phases[-1] == "merge"
    assert train_bpe(STATE_TEXTS, 330, state_dir=state) == train_bpe(STATE_TEXTS, 330)


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, signal\n"
        "from qwenlib.tokenizer import pretokens\n"
        "def tell(done, total):\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    pretokens.CHUNK_BYTES = 100\n"
        "    pretokens.count_pretokens(['words and words'] * 999, 2, progress=tell)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], text=True, stdout=subprocess.PIPE, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while alive := [pid for pid in workers if runs(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def runs(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def resume(state, texts=STATE_TEXTS, vocab_size=300, **settings):
    return train_bpe(texts, vocab_size, state_dir=state, **settings)


def test_a_state_of_other_texts_or_settings_is_refused(tmp_path, small_chunks):
    resume(tmp_path)
    changed = [*STATE_TEXTS[:300], "another text", *STATE_TEXTS[301:]]
    with pytest.raises(ValueError, match=r"other texts: after [\d,]+ bytes these differ, in text "):
        resume(tmp_path, changed)
    with pytest.raises(ValueError, match=r"after [\d,]+ bytes these (differ|end)"):
        resume(tmp_path, STATE_TEXTS[:200])
    with pytest.raises(ValueError, match=r"these differ|they end"):
        resume(tmp_path, [*STATE_TEXTS, "one more"])
    with pytest.raises(ValueError, match="max_words=None, now it is 50"):
        resume(tmp_path, max_words=50)
    with pytest.raises(ValueError, match="chunk_bytes=4000, now it is"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretokens, "CHUNK_BYTES", 5000)
            resume(tmp_path)
    assert resume(tmp_path) == train_bpe(STATE_TEXTS, 300)


def test_more_text_after_whole_chunks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokens, "CHUNK_BYTES", 16)
    resume(tmp_path, ["abab abab abab a"] * 4, 279)
    with pytest.raises(ValueError, match="other texts: they end after 64 bytes"):
        resume(tmp_path, ["abab abab abab a"] * 5, 279)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other files .thesis.txt."):
        resume(tmp_path)


def test_a_state_in_use_is_refused(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom qwenlib.tokenizer.pretokens import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use"):
            resume(tmp_path)
        holder.stdin.close()
    assert resume(tmp_path)


def test_files_left_by_a_killed_merge(tmp_path, small_chunks):
    """Those it had merged already and the one it was writing."""
    kept = tmp_path / "kept"
    with contextlib.suppress(KeyboardInterrupt):
        all_kinds_of_stops(STATE_TEXTS, kept, lambda n: n == 5)
    parts = sorted(kept.glob("counts-*.bin"))
    assert [p.name for p in parts] == ["counts-0-2-0.bin", "counts-2-4-0.bin"]
    shutil.copytree(kept, tmp_path / "state")
    state = tmp_path / "state"
    with contextlib.suppress(KeyboardInterrupt):
        all_kinds_of_stops(STATE_TEXTS, state, lambda n: n == 7)
    assert [p.name for p in state.glob("counts-*.bin")] == ["counts-0-6-1.bin"]
    for part in parts:
        shutil.copy(part, state)
    (state / ".partial-counts-6-8-0.bin").write_bytes(b"torn")
    assert resume(state) == train_bpe(STATE_TEXTS, 300)
    assert sorted(p.name for p in state.iterdir() if p.name != ".lock") == [
        "counts-0-" + str(sum(1 for _ in pretokens._chunks(STATE_TEXTS, 4000))) + "-all.bin",
        "merges.txt", "settings.json",
    ]  # fmt: skip
    (kept / "counts-0-2-0.bin").unlink()
    with pytest.raises(ValueError, match=r"before counts-2-4-0\.bin is lost"):
        resume(kept)


@pytest.mark.parametrize("left", [0, 30, 300, -16, -1])
def test_a_damaged_file_is_named(left, tmp_path):
    resume(tmp_path)
    (counts,) = tmp_path.glob("counts-*.bin")
    counts.write_bytes(counts.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"counts-0-.*\.bin is damaged: delete the folder"):
        resume(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        resume(tmp_path)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, small_chunks):
    def full(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            resume(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert resume(tmp_path) == train_bpe(STATE_TEXTS, 300)


tables = st.lists(
    st.dictionaries(st.binary(max_size=3), st.integers(1, 2**58), max_size=6),
    min_size=1,
    max_size=20,
)


@settings(thorough, max_examples=40)
@given(tables, st.integers(2, 4))
def test_any_tables_are_summed(tables, files_merged):
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(pretokens, "FILES_MERGED", files_merged)
        folder = Path(stack.enter_context(pretokens.tempfile.TemporaryDirectory()))
        files = pretokens._Files(folder)
        for table in tables:
            files.add(table, [])
            assert len(files.files) < 60
        files.finish()
        want = sum(map(Counter, tables), Counter())
        assert list(files.items()) == sorted(want.items())
        assert list(pretokens._Files(folder).items()) == sorted(want.items())
