"""Pre-tokens, bytes and merges by hand; the readable encoder."""

import itertools

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from qwenlib.tokenizer import train_bpe
from qwenlib.tokenizer.bpe import (
    BYTE_ORDER,
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    merge_steps,
    merges_from_ranks,
    pretokenize,
    vocabulary,
)

# As published.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


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


@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_pretokens_of_ascii_text(text):
    """They have an engine of their own."""
    assert pretokenize(text) == regex.findall(PATTERN, text)


def test_pretokens_of_all_short_ascii_texts():
    kinds = "aZsSlLdD'09 \t\r\n\x0b\x0c\x1c\x1f\x00_-.~\x7f"
    for letters in [
        *itertools.product(kinds, repeat=3),
        *itertools.product("'sSlLeE \n", repeat=4),
    ]:
        text = "".join(letters)
        assert pretokenize(text) == regex.findall(PATTERN, text), repr(text)


def test_marks_younger_than_unicode_9_stay_where_they_stand():
    """As in the release. By younger tables U+1DF6 belongs after U+0327, as U+0301 always did."""
    assert pretokenize("q\u1df6\u0327") == ["q", "\u1df6\u0327"]
    assert pretokenize("q\u0301\u0327") == ["q", "\u0327\u0301"]


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="character 2 .*surrogate"):
        pretokenize("ab\ud800c")


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
