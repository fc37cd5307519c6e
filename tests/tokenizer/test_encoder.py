"""The fast way against the `tokenizers` library; threads, offsets, streaming, bad text."""

import json
import multiprocessing
import pickle
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from qwenlib.tokenizer import Tokenizer
from qwenlib.tokenizer.bpe import as_text
from qwenlib.tokenizer.normal_form import normalise
from tests.tokenizer.conftest import CODE, LANGUAGES

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CONTROL_TEXT = st.lists(
    st.one_of(
        TEXT, st.sampled_from(["<|im_end|>", "<|im_start|>", "<tool_call>", "<|im_end", " "])
    ),
    max_size=6,
).map("".join)
MERGES = [
    (b"i", b"n"), (b"\xc3", b"\xa9"), (b" ", b" "), (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x98"),
    (b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"<", b"|"), (b"in", b"g"), (b"\n", b"\n"),
]  # fmt: skip


def build() -> tuple[Tokenizer, Backend, Backend]:
    """A tokenizer and what the `tokenizers` library makes of its file, without and with control."""
    tokenizer = Tokenizer.from_merges(MERGES)
    content = json.loads(tokenizer._full.to_str())
    plain = {**content, "added_tokens": []}
    return tokenizer, Backend.from_str(json.dumps(plain)), Backend.from_str(json.dumps(content))


def drawn(strategy, check):
    """Call check(value) with 300 drawn values."""
    profile = settings(
        max_examples=300, deadline=None, database=None, derandomize=True,
        report_multiple_bugs=False,
    )  # fmt: skip
    profile(given(strategy)(lambda value: check(value)))()


def test_drawn_text_equals_tokenizers():
    tokenizer, plain, full = build()

    def check(text):
        ids = tokenizer.encode(text)
        assert ids == plain.encode(text).ids
        assert tokenizer.encode(text, allow_control=True) == full.encode(text).ids
        assert tokenizer.decode(ids) == normalise(text)

    drawn(CONTROL_TEXT, check)


def test_the_fast_way_is_taken():
    """Without the library's own encoder, except for text with letters it does not know."""
    tokenizer, _, _ = build()
    assert tokenizer._encoder is not None
    tokenizer._plain = None
    assert tokenizer.encode("the é 😀") and tokenizer.encode("<|im_end|>", allow_control=True)


def test_control_strings():
    tokenizer, plain, full = build()
    text = "a<|im_end|><|im_end|>e\u0301<|im_start|>\u0301  <tool_call>x<|im_end"
    assert tokenizer.encode(text) == plain.encode(text).ids
    assert tokenizer.encode(text, allow_control=True) == full.encode(text).ids
    assert tokenizer.encode(text, allow_control=True).count(tokenizer.eos_token_id) == 2
    assert tokenizer.encode_batch([text] * 3, True) == [full.encode(text).ids] * 3


def test_a_mark_after_a_control_token():
    """> and U+0338 compose to one character; a control token's end stays what it is."""
    tokenizer, _, full = build()
    text = "<|im_end|>\u0338"
    assert tokenizer.encode(text, allow_control=True) == full.encode(text).ids
    assert tokenizer.encode(text, allow_control=True)[0] == tokenizer.eos_token_id


def test_younger_marks_are_left_in_place():
    """U+0898 came with Unicode 14: the release's tables do not know that it belongs below."""
    tokenizer, plain, _ = build()
    text = "a\u0301\u0898 e\u0898\u0301 \u1dfa\u0334"
    assert tokenizer.encode(text) == plain.encode(text).ids
    assert normalise(text) == tokenizer.decode(tokenizer.encode(text))
    assert normalise("e\u0898\u0301") == "e\u0898\u0301"
    assert normalise("e\u0323\u0301") == unicodedata.normalize("NFC", "e\u0301\u0323")


@pytest.mark.parametrize("young", ["\u088f", "\U00011de3", "\U000323b0"])
def test_letters_of_unicode_17(young):
    """The `tokenizers` library takes them for signs: what stands beside them is cut otherwise."""
    across = [(b"\x8f", b"t"), (b"\xb0", b"t"), (b" ", b"\xf0")]
    tokenizer = Tokenizer.from_merges(across)
    plain = Backend.from_str(tokenizer._plain.to_str())
    for text in (f" {young}t", f" {young}{young}t <|im_end|>"):
        assert tokenizer.encode(text) == plain.encode(text).ids
        assert tokenizer.encode_batch([text, "t"]) == [
            plain.encode(text).ids,
            tokenizer.encode("t"),
        ]


def test_more_white_space_than_a_stack_holds():
    tokenizer, plain, _ = build()
    for space in " \n\u3000":
        text = "in the" + space * 1_100_000 + "x the"
        assert tokenizer.encode(text) == plain.encode(text).ids


def test_merges_that_ranks_cannot_tell():
    """(a, bc) is no merge here, but the union abc has a rank: only the merges say what happens."""
    untold = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    tokenizer = Tokenizer.from_merges(untold)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("abc")] == [b"a", b"bc"]
    with pytest.raises(ValueError, match="rank file"):
        tokenizer.save_tiktoken(Path(tempfile.mkdtemp()) / "none")


def test_another_pattern_keeps_its_own_way():
    tokenizer = Tokenizer.from_merges([(b"1", b"2"), (b"t", b"h")])
    content = json.loads(tokenizer._full.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{N}+|\P{N}+"}
    other = Tokenizer(content)
    assert [other.token_bytes(i) for i in other.encode("12th")] == [b"12", b"th"]
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("12th")] == [b"1", b"2", b"th"]
    assert other.encode("<|im_end|>1", allow_control=True)[0] == other.eos_token_id
    with pytest.raises(ValueError, match="rank file"):
        other.save_tiktoken(Path(tempfile.mkdtemp()) / "none")


def test_flags_of_added_tokens_are_kept():
    content = json.loads(Tokenizer.from_merges(MERGES)._full.to_str())
    for token in content["added_tokens"]:
        token["lstrip"] = token["content"] == "<|im_end|>"
    tokenizer = Tokenizer(content)
    assert tokenizer.encode("a  <|im_end|>", allow_control=True)[1:] == [tokenizer.eos_token_id]


def test_the_longest_control_token_wins():
    content = json.loads(Tokenizer.from_merges(MERGES)._full.to_str())
    last = content["added_tokens"][-1]
    content["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<|im_end|>!"})
    tokenizer = Tokenizer(content)
    backend = Backend.from_str(json.dumps(content))
    for text in ("a<|im_end|>!b", "<|im_end|>?<|im_end|>!"):
        assert tokenizer.encode(text, allow_control=True) == backend.encode(text).ids


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("allow_control", [True, False])
def test_batches_equal_single_texts(parallel, allow_control):
    tokenizer, plain, full = build()
    texts = [*LANGUAGES.values(), "", CODE, *[f"in <|im_end|>the {n}" for n in range(300)]]
    backend = full if allow_control else plain
    for some in (texts, [*texts, "\u088f"]):
        assert tokenizer.encode_batch(iter(some), allow_control, parallel) == [
            backend.encode(text).ids for text in some
        ]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("more", [[], ["\u088f"], ["", ""]])
def test_arrays_equal_lists(parallel, more):
    """With a text for the slow way, and with empty ones at the ends."""
    tokenizer, _, _ = build()
    texts = [*more, *LANGUAGES.values(), "", CODE, "a<|im_end|>b", *more]
    arrays = tokenizer.encode_arrays(iter(texts), parallel)
    assert [array.tolist() for array in arrays] == tokenizer.encode_batch(texts)
    assert {array.dtype for array in arrays} == {np.dtype("uint32")}
    assert tokenizer.encode_arrays([]) == []
    with pytest.raises(ValueError, match="text 1: .*lone surrogate"):
        tokenizer.encode_arrays(["a", "c\udc00"])


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    tokenizer, _, _ = build()
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint
    pattern = {"Regex": r"\p{N}+|\P{N}+"}

    def other_pattern(content):
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = pattern

    def other_control(content):
        content["added_tokens"][-1]["content"] = "<|other|>"

    others = [Tokenizer.from_merges(MERGES[:-1]), changed(other_pattern), changed(other_control)]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_other_pre_tokenizers_in_batches():
    content = json.loads(Tokenizer.from_merges(MERGES)._full.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{N}+|\P{N}+"}
    tokenizer = Tokenizer(content)
    for parallel in (True, False):
        assert tokenizer.encode_batch(["12 in", "the"], parallel=parallel) == [
            tokenizer.encode("12 in"), tokenizer.encode("the")
        ]  # fmt: skip


def test_threads_may_share_a_tokenizer():
    tokenizer, plain, _ = build()
    texts = [f"{n} the {'in ' * 2000}" for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokenizer.encode, texts))
        batches = list(pool.map(tokenizer.encode_batch, [texts[:9], texts[9:]]))
    assert found == sum(batches, []) == [plain.encode(text).ids for text in texts]


def test_a_tokenizer_goes_to_another_process():
    tokenizer, plain, _ = build()
    tokenizer.encode("in", allow_control=True)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("the 1") == plain.encode("the 1").ids
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(tokenizer.encode_batch, (["the 1"] * 50,)) == [again.encode("the 1")] * 50


@pytest.mark.parametrize("allow_control", [False, True])
def test_an_error_in_a_batch_names_the_text(allow_control):
    tokenizer, _, _ = build()
    with pytest.raises(ValueError, match="text 2: character 1 .*lone surrogate"):
        tokenizer.encode_batch(["a", "b", "c\udc00", "d"] * 4, allow_control)
    with pytest.raises(TypeError, match="text 1: .*NoneType"):
        tokenizer.encode_batch(["a", None], allow_control)


def changed(change) -> Tokenizer:
    content = json.loads(Tokenizer.from_merges(MERGES)._full.to_str())
    change(content)
    return Tokenizer(content)


CHANGES = {
    "another normal form": lambda c: c.update(normalizer={"type": "NFD"}),
    "no normal form": lambda c: c.update(normalizer=None),
    "another step": lambda c: c["pre_tokenizer"]["pretokenizers"].append(
        {"type": "Split", "pattern": {"String": "h"}, "behavior": "Isolated", "invert": False}
    ),
    "removed matches": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "no pre-tokenizer": lambda c: c.update(pre_tokenizer=None),
    "dropout": lambda c: c["model"].update(dropout=1.0),
    "whole words first": lambda c: c["model"].update(ignore_merges=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_differs_from_qwen_keeps_its_own_way(name):
    tokenizer = changed(CHANGES[name])
    backend = Backend.from_str(tokenizer._plain.to_str())
    for text in ("the inth", "e\u0301\u00e9 12", "ing the"):
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.encode_batch([text]) == [backend.encode(text).ids]


def test_a_vocabulary_without_all_bytes():
    def leave_out(content):
        letters = {as_text(bytes([b])) for b in b"the in"}
        vocab = content["model"]["vocab"]
        kept = [t for t in vocab if len(t) > 1 or t in letters]
        content["model"]["merges"] = [
            m for m in content["model"]["merges"]
            if set("".join(m if isinstance(m, list) else m.split(" "))) <= letters
        ]  # fmt: skip
        content["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
        for n, token in enumerate(content["added_tokens"]):
            token["id"] = len(kept) + n

    tokenizer = changed(leave_out)
    backend = Backend.from_str(tokenizer._plain.to_str())
    assert tokenizer.encode("in the") == backend.encode("in the").ids != []


def test_the_encoder_forgets(monkeypatch):
    """Its library keeps each new word for good, so it begins anew now and then."""
    monkeypatch.setattr("qwenlib.tokenizer.encoder._RENEW", 1000)
    tokenizer, plain, _ = build()
    cores = set()
    for n in range(10):
        assert tokenizer.encode_batch([f"the {n} " * 50]) == [plain.encode(f"the {n} " * 50).ids]
        assert tokenizer.encode(f"in{n}") == plain.encode(f"in{n}").ids
        cores.add(id(tokenizer._encoder._core))
        kept = tokenizer._encoder._core  # noqa: F841  an id may return when its object is gone
    assert len(cores) > 1


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (None, TypeError, "a text is a str, not NoneType"), (b"x", TypeError, "not bytes"),
        (["x"], TypeError, "not list"),
        ("ok\ud83d", ValueError, r"character 2 .*\\ud83d.*surrogatepass"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow_control", [False, True])
def test_no_text(bad, error, match, allow_control):
    tokenizer, _, _ = build()
    for call in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(error, match=match):
            call(bad, allow_control)


def test_a_batch_of_one_str():
    tokenizer, _, _ = build()
    with pytest.raises(TypeError, match=r"\[text\]"):
        tokenizer.encode_batch("several texts")


def with_offsets(tokenizer, text):
    try:
        return tokenizer.encode_with_offsets(text)
    except ValueError as error:
        pytest.fail(f"the places do not match the text: {error}")


def test_offsets_by_hand():
    tokenizer, _, _ = build()
    ids, offsets = with_offsets(tokenizer, "e\u0301 the😀")
    assert ids == tokenizer.encode("e\u0301 the😀")
    # é is two characters here; the emoji's three tokens share one place.
    assert offsets == [(0, 2), (2, 6), (6, 7), (6, 7)]
    ids, offsets = tokenizer.encode_with_offsets("x<|im_end|>y", allow_control=True)
    assert ids[1] == tokenizer.eos_token_id and offsets == [(0, 1), (1, 11), (11, 12)]
    assert tokenizer.encode_with_offsets("") == ([], [])


@pytest.mark.parametrize("mark", ["\u0f73", "\u0f75", "\u0f81", "\u0344"])
def test_offsets_of_marks_that_fall_apart(mark):
    """Some characters are no marks themselves but become two."""
    tokenizer, _, _ = build()
    ids, offsets = tokenizer.encode_with_offsets(f"e{mark}\u0301 abc")
    assert offsets[-4:] == [(3, 4), (4, 5), (5, 6), (6, 7)]
    assert tokenizer.decode(ids) == normalise(f"e{mark}\u0301 abc")
    assert set(offsets[:-4]) <= {(0, 3), (0, 1), (1, 3), (1, 2), (2, 3)}


def test_offsets_of_syllables():
    """Hangul composes without combining marks: two or three letters become one syllable."""
    tokenizer, _, _ = build()
    text = "\u1112\u1161\u11ab\u1100 x"  # the last letter stays alone
    ids, offsets = with_offsets(tokenizer, text)
    assert tokenizer.decode(ids) == "\ud55c\u1100 x"
    assert sorted(set(offsets)) == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_offsets_cut_the_text_into_parts_that_normalise_alone():
    """Tokens with one place, taken together, spell the normal form of that place."""
    tokenizer, _, full = build()

    def check(text, allow_control=True):
        ids, offsets = tokenizer.encode_with_offsets(text, allow_control)
        assert ids == tokenizer.encode(text, allow_control)
        end = 0
        for place in offsets:
            assert place[0] <= end <= place[1], "a gap, or a step back"
            end = place[1]
        assert end == len(text)
        if normalise(text) == text:
            assert offsets == full.encode(text).offsets
        # Cut where a token begins a new place: both sides are texts of their own.
        for before, place in zip(offsets, offsets[1:]):
            if place[0] >= before[1]:
                left, right = text[: place[0]], text[place[0] :]
                assert tokenizer.decode(ids) == "".join(
                    tokenizer.decode(tokenizer.encode(side, allow_control))
                    for side in (left, right)
                )

    for text in (CODE, *LANGUAGES.values()):
        check(text)
        check(unicodedata.normalize("NFD", text))
    drawn(CONTROL_TEXT, check)


def test_stream_holds_back_half_a_character():
    tokenizer, _, _ = build()
    stream, text = tokenizer.stream(), "é😀 the"
    ids = tokenizer.encode(text)
    assert [stream.push(i) for i in ids] == ["é", "", "😀", " the"]
    assert stream.finish() == ""
    assert tokenizer.stream().push(ids) == text


def test_stream_takes_any_kind_of_id():
    tokenizer, _, _ = build()
    ids = [*tokenizer.encode("the é"), tokenizer.eos_token_id]
    for skip in (False, True):
        want = tokenizer.decode(ids, skip_special_tokens=skip)
        for several in (ids, np.array(ids), torch.tensor(ids), tuple(ids)):
            assert tokenizer.stream(skip).push(several) == want
        stream = tokenizer.stream(skip)
        assert "".join(stream.push(i) for i in torch.tensor(ids)) == want
        assert tokenizer.stream(skip).push(np.int64(ids[0])) == "the"
    with pytest.raises(TypeError):
        tokenizer.stream().push(["a"])


def test_stream_of_broken_bytes():
    tokenizer, _, _ = build()
    first = tokenizer.encode("😀")[0]  # two of four bytes
    stream = tokenizer.stream()
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(tokenizer.encode("x")) == "x", "finish starts anew"
    assert stream.push([first, *tokenizer.encode("x")]) == "\ufffdx"
    assert stream.push(tokenizer.vocab_size + 3) == "", "a padded row has no text"
    with pytest.raises(ValueError, match="negative"):
        stream.push(-100)


def test_streamed_text_is_decoded_text():
    tokenizer, _, _ = build()

    def check(ids):
        for skip in (False, True):
            stream, whole = tokenizer.stream(skip), tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join([*map(stream.push, ids), stream.finish()]) == whole

    drawn(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=20), check)


def test_decode_bytes():
    tokenizer, _, _ = build()
    ids = tokenizer.encode("é😀")
    assert tokenizer.decode_bytes(ids) == "é😀".encode()
    assert (
        tokenizer.decode_bytes([*ids[:2], tokenizer.vocab_size + 9])
        == "é".encode() + b"\xf0\x9f\x98"
    )
    with pytest.raises(ValueError, match="negative"):
        tokenizer.decode_bytes([-1])


def test_rank_file_round_trip(tmp_path):
    tokenizer, _, _ = build()
    tokenizer.save_tiktoken(tmp_path / "small.tiktoken")
    again = Tokenizer.from_tiktoken(tmp_path / "small.tiktoken")
    assert again.merges == tokenizer.merges
    assert [p.name for p in tmp_path.iterdir()] == ["small.tiktoken"]
    with pytest.raises(FileNotFoundError):
        tokenizer.save_tiktoken(tmp_path / "no" / "folder")
