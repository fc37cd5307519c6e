"""The trainer, readable and compiled, against a naive one and `tokenizers`; counting pre-tokens."""

import contextlib
import ctypes
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from qwenlib import c_build as build
from qwenlib.tokenizer import train_bpe, trainer
from qwenlib.tokenizer.bpe import BYTE_ORDER, CHAR_TO_BYTE, vocabulary
from qwenlib.tokenizer.tokenizer import qwen_pipeline
from qwenlib.tokenizer.trainer import count_pretokens, merges_from_counts, readable_merges
from tests.tokenizer.conftest import CODE, LANGUAGES

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [CODE, *LANGUAGES.values(), "system user assistant don't we're 12 345\r\n\r\n\n  x"] * 3
# Without a search for the smallest case: a mutation is to be noticed at once.
thorough = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip


def compiled_merges(counts, n_regular, progress=None, min_count=2):
    assert trainer._library() is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "readable_merges", None)
        return merges_from_counts(counts, n_regular, progress, min_count)


ENGINES = [
    pytest.param(readable_merges, id="readable"),
    pytest.param(compiled_merges, id="compiled", marks=needs_compiler),
]
BOTH = [readable_merges] + [compiled_merges] * (COMPILER is not None)


def naive_counts(texts):
    nfc = tokenizers.normalizers.NFC().normalize_str
    return Counter(word.encode() for text in texts for word in regex.findall(PATTERN, nfc(text)))


def naive_merges(counts, n_regular, min_count=2):
    """Count every pair again after every merge; ties to the smallest pair of ids.

    Ends early, where no pair occurs `min_count` times; the number of tokens comes with the merges.
    """
    words = Counter()
    for word, n in counts.items():
        words[tuple(bytes([b]) for b in word)] += n
    ids = {bytes([b]): i for i, b in enumerate(BYTE_ORDER)}
    merges = []
    while len(ids) < n_regular:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        if max(pairs.values(), default=0) < min_count:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        assert best[0] + best[1] not in ids and best not in merges
        ids[best[0] + best[1]] = len(ids)
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(best[0] + best[1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] += n
        words = merged
    return merges, len(ids)


def assert_as_naive(engine, counts, n_regular, min_count=2):
    want, reached = naive_merges(counts, n_regular, min_count)
    try:
        assert engine(counts, reached, min_count=min_count) == want
    except (KeyError, ValueError) as error:
        raise AssertionError(f"{len(want)} merges can be made") from error
    if reached < n_regular:
        with pytest.raises(
            ValueError, match=f"only {reached} regular tokens, {n_regular} were asked"
        ):
            engine(counts, n_regular, min_count=min_count)


def random_letters(alphabet, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(120)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("texts", "n_regular"),
    [
        (random_letters("ab ", 1), 330),  # ties
        (random_letters("aab", 2), 310),  # runs of one letter: overlapping pairs
        (random_letters("abcdefg \n'", 3), 420),
        (random_letters("éüñ你好🙂 1", 4), 340),
        (CORPUS, 478),
    ],
)
def test_same_merges_as_naive(texts, n_regular, engine):
    assert_as_naive(engine, naive_counts(texts), n_regular, min_count=1)


words_of_few_letters = st.dictionaries(
    st.lists(st.sampled_from(b"abc"), max_size=14).map(bytes),
    st.one_of(st.integers(1, 4), st.integers(1, 2**50)), max_size=12,
)  # fmt: skip


@thorough
@given(words_of_few_letters, st.integers(256, 300), st.integers(1, 5))
@example({b"aaaaaaa": 1, b"aaaab": 3, b"": 9}, 270, 1)
def test_any_counts(counts, n_regular, min_count):
    for engine in BOTH:
        assert_as_naive(engine, counts, n_regular, min_count)


@thorough
@given(st.lists(st.text(max_size=30), max_size=6), st.integers(256, 290))
def test_any_texts(texts, n_regular):
    counts = naive_counts(texts)
    assert count_pretokens(texts) == counts
    for engine in BOTH:
        assert_as_naive(engine, counts, n_regular, min_count=1)


def test_many_pairs():
    """More than the hash table has room for at first, and a heap of some depth."""
    rng = random.Random(0)
    counts = {rng.randbytes(rng.randint(2, 20)): rng.randint(1, 9) for _ in range(900)}
    for engine in BOTH:
        assert_as_naive(engine, counts, 300)


@pytest.mark.parametrize("engine", ENGINES)
def test_worked_example(engine):
    counts = Counter({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3})
    # e+s and s+t occur 9 times each; "e" has the smaller id.
    assert engine(counts, 256 + 4) == [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_counts_to_the_end(engine):
    seen = []
    engine(count_pretokens(CORPUS), 286, lambda *now: seen.append(now))
    assert seen == [(done, 30) for done in range(1, 31)]


def test_counts_beyond_64_bits():
    counts = {b"abab": 2**62, b"bc": 2**70, b"aaa": 3}
    assert_as_naive(merges_from_counts, counts, 259)


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_comes_through(engine):
    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(count_pretokens(CORPUS), 290, interrupt)


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="min_count=0"):
        merges_from_counts({b"ab": 2}, 257, min_count=0)
    with pytest.raises(ValueError, match="less than once"):
        merges_from_counts({b"ab": 2, b"b": 0}, 257)


def test_small_vocabulary_and_short_text_are_refused():
    with pytest.raises(ValueError, match="below 278"):
        train_bpe(["abc"], 277)
    with pytest.raises(ValueError, match="more text"):
        train_bpe(["ab ab"], 300)
    assert train_bpe([], 278) == []


def test_train_bpe_end_to_end():
    seen = []
    merges = train_bpe(CORPUS, 500, lambda *now: seen.append(now))
    assert merges == naive_merges(naive_counts(CORPUS), 478)[0]
    assert merges == train_bpe(reversed(CORPUS), 500, workers=2)
    assert len(vocabulary(merges)) == 478
    assert seen[0] == ("read", sum(len(text.encode()) for text in CORPUS), None)
    assert seen[1:] == [("merge", done, 222) for done in range(1, 223)]


@pytest.mark.slow
def test_same_merges_as_tokenizers():
    """5 MB of Python sources; both give ties to the smallest pair of ids."""
    paths = sorted(Path(json.__file__).parents[1].rglob("*.py"), key=lambda p: (p.name, str(p)))
    texts, size = [], 0
    for path in paths:
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(path.read_bytes().decode())
            size += len(texts[-1])
        if size > 5_000_000:
            break
    else:
        pytest.skip("this Python comes without 5 MB of sources")
    n_regular = 8192
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.normalizer, peer.pre_tokenizer = qwen_pipeline()
    peer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=n_regular, min_frequency=2, show_progress=False, special_tokens=[],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    theirs = [
        tuple(bytes(CHAR_TO_BYTE[c] for c in token) for token in merge)
        for merge in json.loads(peer.to_str())["model"]["merges"]
    ]
    assert merges_from_counts(count_pretokens(texts, workers=2), n_regular) == theirs


# --- the compiled part


def test_without_a_compiler(monkeypatch, tmp_path):
    counts = count_pretokens(CORPUS)
    want = merges_from_counts(counts, 300)
    called = []

    def spy(*arguments):
        called.append(arguments)
        return readable_merges(*arguments)

    monkeypatch.setattr(trainer, "readable_merges", spy)
    for name, value in (("QWENLIB_NATIVE", "0"), ("CC", "/no/such/compiler")):
        build.compiled.cache_clear()
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            patch.setenv(name, value)
            patch.setenv("QWENLIB_CACHE", str(tmp_path))
            warnings.simplefilter("always")
            assert merges_from_counts(counts, 300) == want
        assert [str(w.message).split(":")[0] for w in caught] == [
            "trainer.c does not run here, Python's slower way is taken"
        ] * (name == "CC")
    build.compiled.cache_clear()
    assert len(called) == 2


@needs_compiler
def test_any_allocation_may_fail(tmp_path, monkeypatch):
    source = tmp_path / "failing.c"
    source.write_text(f"""
        #include <stdlib.h>
        static long left;
        void fail_after(long allocations) {{ left = allocations; }}
        static void *new_(size_t n) {{ return left-- > 0 ? malloc(n) : NULL; }}
        static void *zeros(size_t m, size_t n) {{ return left-- > 0 ? calloc(m, n) : NULL; }}
        static void *resized(void *p, size_t n) {{ return left-- > 0 ? realloc(p, n) : NULL; }}
        #define malloc new_
        #define calloc zeros
        #define realloc resized
        #include "{trainer._SOURCE}"
    """)
    command = [*shlex.split(COMPILER), "-shared", "-fPIC", "-o", str(tmp_path / "a.so")]
    subprocess.run([*command, str(source)], check=True)
    library = ctypes.CDLL(str(tmp_path / "a.so"))
    monkeypatch.setattr(trainer, "compiled", lambda *_: library)
    counts = count_pretokens(random_letters("abc", 5)[:40])
    want, failed = readable_merges(counts, 290), 0
    for allocations in itertools.count():
        library.fail_after(ctypes.c_long(allocations))
        try:
            assert merges_from_counts(counts, 290) == want
            break
        except MemoryError as error:
            assert "smaller memory_mb or max_words" in str(error)
            failed += 1
    assert failed > 50


# --- merges on disk


def resume(state, texts=CORPUS, vocab_size=300, **settings):
    return train_bpe(texts, vocab_size, state_dir=state, **settings)


@pytest.mark.parametrize("native", ["0", "1"])
def test_merges_go_on_from_those_on_disk(native, tmp_path, monkeypatch):
    """A larger vocabulary too, a torn last line, none at all."""
    monkeypatch.setenv("QWENLIB_NATIVE", native)
    build.compiled.cache_clear()
    searched, append = [], trainer.MergeLog.append
    monkeypatch.setattr(
        trainer.MergeLog, "append", lambda log, step: searched.append(step) or append(log, step)
    )
    texts = random_letters("aab", 2)
    resume(tmp_path, texts, 300, min_count=1)
    log = tmp_path / "merges.txt"
    want = train_bpe(texts, 340, min_count=1)
    whole = log.read_bytes()
    for content in (
        whole,
        whole[:-1],
        whole[:-5],
        whole[: whole.index(b"\n") + 1],
        b"merges o",
        b"",
    ):
        log.write_bytes(content)
        searched.clear()
        assert resume(tmp_path, texts, 340, min_count=1) == want
        assert len(searched) == len(want) - max(0, content.count(b"\n") - 1)
        assert log.read_bytes().startswith(whole)
        assert resume(tmp_path, texts, 300, min_count=1) == want[:22]
    build.compiled.cache_clear()


def test_a_damaged_list_of_merges_is_refused(tmp_path):
    resume(tmp_path)
    log = tmp_path / "merges.txt"
    head, first, *rest = log.read_text().splitlines(keepends=True)
    for bad in ("1 two\n", "1\n", "3 256\n", "-1 3\n"):
        log.write_text("".join([head, bad, *rest]))
        with pytest.raises(ValueError, match=r"merges\.txt, line 2: no pair of earlier tokens"):
            resume(tmp_path)
    log.write_text("merges of 3 pre-tokens that occur 9 times\n" + first)
    with pytest.raises(ValueError, match=r"of 3 pre-tokens that occur 9 times, these are"):
        resume(tmp_path)


def test_the_first_merge_counts_as_often_as_the_second_run_asks(tmp_path):
    texts = ["ab"] * 5
    assert resume(tmp_path, texts, 279) == [(b"a", b"b")]
    with pytest.raises(ValueError, match="only 256 regular tokens"):
        resume(tmp_path, texts, 279, min_count=6)


def test_settings_are_checked_before_any_text_is_read():
    def texts():
        pytest.fail("read")
        yield ""

    with pytest.raises(ValueError, match="min_count=0"):
        train_bpe(texts(), 300, min_count=0)
    with pytest.raises(ValueError, match="below 278"):
        train_bpe(texts(), 200)


def test_one_text_is_not_several():
    with pytest.raises(TypeError, match=r"\[text\]"):
        train_bpe("the cat sat on the mat", 300)


def test_a_log_of_other_counts_of_the_same_sum_is_refused(tmp_path):
    log = tmp_path / "merges.txt"
    one, other = ({b"ab": 5, b"cd": 3}, {b"ab": 3, b"cd": 5})
    assert merges_from_counts(one, 257, log=log) == [(b"a", b"b")]
    with pytest.raises(ValueError, match="give another folder"):
        merges_from_counts(other, 257, log=log)
    assert merges_from_counts(one, 258, log=log) == [(b"a", b"b"), (b"c", b"d")]


@pytest.mark.parametrize("content", [b"my notes", b"my notes\nmore", b"merges of nothing"])
def test_a_file_that_is_no_log_is_left_alone(content, tmp_path):
    log = tmp_path / "merges.txt"
    log.write_bytes(content)
    with pytest.raises(ValueError, match="give another folder"):
        merges_from_counts({b"ab": 5}, 257, log=log)
    assert log.read_bytes() == content


def test_a_log_torn_in_its_first_line_begins_anew(tmp_path):
    log = tmp_path / "merges.txt"
    merges_from_counts({b"ab": 5}, 257, log=log)
    whole = log.read_bytes()
    for size in (0, 1, 20, whole.index(b"\n")):
        log.write_bytes(whole[:size])
        assert merges_from_counts({b"ab": 5}, 257, log=log) == [(b"a", b"b")]
        assert log.read_bytes() == whole
