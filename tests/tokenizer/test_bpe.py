"""The trainer against a naive one, worked examples, and the readable encoder."""

import random
import unicodedata
from collections import Counter

import pytest
import regex

from qwenlib.tokenizer import train_bpe
from qwenlib.tokenizer.bpe import (
    BYTE_ORDER,
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    count_pretokens,
    merge_steps,
    merges_from_counts,
    merges_from_ranks,
    pretokenize,
    vocabulary,
)

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def naive_merges(texts, n_regular):
    """Count every pair again after every merge; ties to the smallest pair of ids."""
    words = Counter()
    for text in texts:
        for word in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
            words[tuple(bytes([b]) for b in word.encode())] += 1
    ids = {bytes([b]): i for i, b in enumerate(BYTE_ORDER)}
    merges = []
    while len(ids) < n_regular:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault(best[0] + best[1], len(ids))
        if best not in merges:
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
    return merges


def random_letters(alphabet, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(120)]


@pytest.mark.parametrize(
    ("texts", "n_regular"),
    [
        (random_letters("ab ", 1), 330),  # ties and tokens reached by two routes
        (random_letters("aab", 2), 310),  # runs of one letter: overlapping pairs
        (random_letters("abcdefg \n'", 3), 420),
        (random_letters("éüñ你好🙂 1", 4), 340),
        (["the quick brown fox. the lazy dog! then they thaw. " * 2] * 3, 280),
    ],
)
def test_same_merges_as_naive(texts, n_regular):
    got = merges_from_counts(count_pretokens(texts), n_regular, min_count=1)
    assert got == naive_merges(texts, n_regular)


def test_same_merges_as_naive_on_code_and_languages(corpus):
    assert train_bpe(corpus, 500) == naive_merges(corpus, 500 - 22)


def test_worked_example():
    counts = Counter({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3})
    merges = merges_from_counts(counts, 256 + 4)
    # e+s and s+t occur 9 times each; "e" has the smaller id.
    assert merges == [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]


def test_order_of_texts_does_not_matter(corpus):
    assert train_bpe(corpus, 450) == train_bpe(list(reversed(corpus)), 450)


def test_progress_counts_to_the_end(corpus):
    seen = []
    train_bpe(corpus, 256 + 22 + 30, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 1
    assert seen[-1] == (30, 30)


def test_vocabulary_has_exactly_the_asked_size(corpus):
    assert len(vocabulary(train_bpe(corpus, 600))) == 600 - 22


def test_small_vocabulary_and_short_text_are_refused():
    with pytest.raises(ValueError, match="below 278"):
        train_bpe(["abc"], 277)
    with pytest.raises(ValueError, match="more text"):
        train_bpe(["ab ab"], 300)


def test_vocabulary_refuses_a_merge_of_unknown_parts():
    with pytest.raises(ValueError, match="no earlier merge"):
        vocabulary([(b"ab", b"c")])


def test_bytes_and_characters_are_one_to_one():
    assert sorted(BYTE_ORDER) == list(range(256))
    assert BYTE_ORDER[:3] == (ord("!"), ord('"'), ord("#"))
    assert len(CHAR_TO_BYTE) == 256
    assert BYTE_TO_CHAR[ord(" ")] == "Ġ"
    assert BYTE_TO_CHAR[ord("\n")] == "Ċ"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Don't stop", ["Don", "'t", " stop"]),
        ("in 2024", ["in", " ", "2", "0", "2", "4"]),
        ("a  b", ["a", " ", " b"]),
        ("x=1;\n\ny", ["x", "=", "1", ";\n\n", "y"]),
        ("  \n\n z", ["  \n\n", " z"]),
        ("f(x) -> y", ["f", "(x", ")", " ->", " y"]),
        ("e\u0301", ["\u00e9"]),
        ("", []),
    ],
)
def test_pretokens_by_hand(text, parts):
    assert pretokenize(text) == parts


def test_merge_steps_by_hand():
    ranks = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"a", b"bc"): 2}
    assert merge_steps(b"abcab", ranks) == [
        [b"a", b"b", b"c", b"a", b"b"],
        [b"a", b"bc", b"a", b"b"],
        [b"a", b"bc", b"ab"],
        [b"abc", b"ab"],
    ]
    assert merge_steps(b"", ranks) == [[]]


def test_merges_come_back_from_ranks(corpus):
    merges = train_bpe(corpus, 400)
    tokens = vocabulary(merges)
    assert len(tokens) == 256 + len(merges), "this corpus reaches a token by two routes"
    assert merges_from_ranks({token: i for i, token in enumerate(tokens)}) == merges


def test_ranks_without_a_last_merge_are_refused():
    with pytest.raises(ValueError, match="no union"):
        merges_from_ranks({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})
