"""GPT-2's tokenizer against tiktoken and published ids."""

import json
import random

import pytest
import tiktoken

from qwenlib.tokenizer import bpe
from qwenlib.tokenizer.gpt2 import GPT2_PATTERN, GPT2Tokenizer, gpt2_pretokenize, read_merges
from tests.tokenizer.conftest import CODE, LANGUAGES

# Merges that no training is needed for: every pair of printable ASCII bytes, "the" and a number.
PAIRS = [(bytes([a]), bytes([b])) for a in range(32, 127) for b in range(32, 127)]
MERGES = [*PAIRS, (b"th", b"e"), (b" t", b"he"), (b"12", b"34")]
TEXTS = [CODE, *LANGUAGES.values(), "", "  x\r\n\n\t1234567 3.14", "🙂👩🏽‍🚀 e\u0301 é \x00",
         "WE'LL we'll <|endoftext|>"]  # fmt: skip


def oracle(merges):
    ranks = {token: rank for rank, token in enumerate(bpe.vocabulary(merges))}
    return tiktoken.Encoding(
        "oracle", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )  # fmt: skip


def test_ids_equal_tiktoken():
    ours, theirs = GPT2Tokenizer(MERGES), oracle(MERGES)
    assert ours.vocab_size == theirs.n_vocab == 256 + len(MERGES) + 1
    expected = [theirs.encode_ordinary(text) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS) == expected


def test_round_trip_without_a_normal_form():
    tokenizer = GPT2Tokenizer(MERGES)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert "".join(gpt2_pretokenize(text)) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("in 2024", ["in", " 2024"]),
        ("3.14", ["3", ".", "14"]),
        ("    x", ["   ", " x"]),
        ("f(x)", ["f", "(", "x", ")"]),
        ("a;\r\nb", ["a", ";", "\r", "\n", "b"]),
        ("we'll WE'LL", ["we", "'ll", " WE", "'", "LL"]),
    ],
)
def test_pieces_by_hand(text, pieces):
    assert gpt2_pretokenize(text) == pieces


def test_offsets_name_whole_characters():
    text = "a🙂 the1234"
    tokenizer = GPT2Tokenizer(MERGES)
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert offsets == [(0, 1), *[(1, 2)] * 4, (2, 6), (6, 10)]


def test_another_pattern():
    tokenizer = GPT2Tokenizer(MERGES, bpe.PRETOKEN_PATTERN)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("a 12")] == [b"a", b" ", b"1", b"2"]


def test_its_control_token_cannot_be_spelled():
    tokenizer = GPT2Tokenizer(MERGES)
    (end,) = tokenizer.control.values()
    assert end == tokenizer.vocab_size - 1
    assert end not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.token_bytes(end) == b"<|endoftext|>"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.token_bytes(end + 1)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.token_bytes(-1)


def test_merges_file(tmp_path):
    path = tmp_path / "vocab.bpe"
    path.write_text("#version: 0.2\nĠ t\nĠt he\n", encoding="utf-8")
    assert read_merges(path) == [(b" ", b"t"), (b" t", b"he")]
    for line in ("onlyone", "a b c", "a \u4e2d"):
        path.write_text(f"#version: 0.2\nĠ t\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="vocab.bpe, line 3: not two tokens"):
            read_merges(path)


@pytest.mark.network
def test_real_vocabulary():
    tokenizer = GPT2Tokenizer.from_asset()
    assert tokenizer.vocab_size == 50_257
    assert tokenizer.control == {"<|endoftext|>": 50_256}
    assert tokenizer.encode("Hello world") == [15496, 995]
    merges = [
        (tokenizer.token_bytes(i), tokenizer.token_bytes(j))
        for i, j in [(220, 83), (220, 64)]  # the file's first two lines: "Ġ t", "Ġ a"
    ]
    assert [tokenizer.token_bytes(256 + n) for n in range(2)] == [a + b for a, b in merges]
    theirs = oracle(read_merges_of(tokenizer))
    rng = random.Random(0)
    numbers = [str(rng.randrange(10**n)) for n in range(1, 13) for _ in range(20)]
    for text in [*TEXTS, *numbers]:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)


def read_merges_of(tokenizer):
    model = json.loads(tokenizer._backend.to_str())["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return [tuple(bytes(bpe.CHAR_TO_BYTE[c] for c in part) for part in pair) for pair in pairs]
