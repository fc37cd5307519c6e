"""The real vocabulary against transformers' own Qwen2 tokenizer, on more than 200,000 strings."""

import itertools
import json
import random
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlib import assets
from qwenlib.tokenizer import CONTROL_TOKENS, Tokenizer
from qwenlib.tokenizer.normal_form import normalise

pytestmark = [pytest.mark.slow, pytest.mark.network]
NAMES = [token.text for token in CONTROL_TOKENS]
MARKS = "\u0301\u0308\u0323\u0327\u0334\u05b0\u0bbe\u1161\u11a8\u3099\u0898\u1dfa"
PIECES = [
    *"aZéßſKñçøИжλאمकกあア漢한ǅªº²½٣५Ⅷ⑤〇_'\"-–…€$+=<>|^`~\\/@#%&*()[]{}.,;:!?¿😀👩🏽🇪🇺",
    *MARKS, *" \t\n\r\v\f\x1c\x1f\x00\x7f\x85\xa0\u180e\u2028\u2029\u200b\u200d\ufe0f\u3000\ufeff",
    "  ", "\r\n", " \n", "\n\n", "'s", "'T", "'re", "'LL", "’s", "'ſ", "don't", "12", "2024", "🏳️‍🌈",
]  # fmt: skip


@pytest.fixture(scope="module")
def real():
    try:
        return Tokenizer.from_asset()
    except assets.AssetError as error:
        pytest.skip(f"the real vocabulary cannot be fetched: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def oracle(real, tmp_path_factory):
    """transformers' class with its own normaliser and pattern.

    The vocabulary, the merges and the names of the control tokens are all that it gets from here.
    """
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vocabulary")
    real.save_pretrained(folder)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    oracle = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    oracle.add_tokens(
        [
            transformers.AddedToken(token.text, special=token.special, normalized=False)
            for token in CONTROL_TOKENS
        ]
    )
    return oracle


@pytest.fixture(scope="module")
def compare(real, oracle):
    """A function that compares the ids of strings."""
    # The Rust tokenizer that transformers has set up and calls.
    backend = oracle.backend_tokenizer

    def check(texts: Iterable[str]) -> None:
        texts = list(texts)
        expected = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
        with_control = real.encode_batch(texts, allow_control=True)
        for text, ids, plain, theirs in zip(
            texts, with_control, real.encode_batch(texts), expected, strict=True
        ):
            assert ids == theirs, repr(text[:200])
            assert real.decode(plain) == normalise(text), repr(text[:200])
            if any(name in text for name in NAMES):
                assert max(plain) < real.end_of_text_id, repr(text[:200])
            else:
                assert plain == theirs, repr(text[:200])

    return check


def every_character() -> Iterator[str]:
    """Each code point of every block beside letters, digits, spaces, quotes, marks and itself."""
    points = (chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
    while group := "".join(itertools.islice(points, 8)):
        yield "".join(f"a{c}1{c}{c} {c}'{c}\n{c}\u0301" for c in group)


def mixtures(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 24)))


def source_lines() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def emoji() -> Iterator[str]:
    people, tones = "👩👨🧑👶", ["", *"🏻🏼🏽🏾🏿"]
    jobs = ["", "\u200d🚀", "\u200d⚕️", "\u200d❤️\u200d💋\u200d👨", "\ufe0f", "\ufe0e", "\u20e3"]
    yield from map("".join, itertools.product(people, tones, jobs, ["", " x", "1"]))
    flags = [chr(0x1F1E6 + n) for n in range(26)]
    yield from map("".join, itertools.product(flags, flags, ["", "🇪"]))


def decomposed() -> Iterator[str]:
    """NFD and stacked marks, in every order of three."""
    for base in "aeouAOnycsdlאقกक가한がのΩи":
        for marks in itertools.product(MARKS, repeat=3):
            yield unicodedata.normalize("NFD", f"{base}{''.join(marks)}x")


def look_alikes() -> Iterator[str]:
    for first, second in itertools.product(NAMES, NAMES):
        yield f"a{first}{second} b"
        yield f"{first[:-1]}{second[1:]}"
        yield f"<{first}{second}>\n\n{first} {second}"
    for name in NAMES:
        for i in range(len(name)):
            yield from (name[:i], name[i:], name[:i] + "\u0301" + name[i:], name[:i] + name)
            yield name[:i] + name[i].upper() + name[i + 1 :]


def broken_bytes(count: int) -> Iterator[str]:
    rng = random.Random(1)
    for _ in range(count):
        raw = bytearray("né 漢🙂'll\n".encode() * rng.randint(1, 3))
        for _ in range(rng.randint(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        yield raw.decode("utf-8", "replace")


SOURCES = {
    "every character": every_character,
    "mixtures": lambda: mixtures(40_000),
    "source code": source_lines,
    "emoji": emoji,
    "decomposed": decomposed,
    "control look-alikes": look_alikes,
    "broken bytes": lambda: broken_bytes(10_000),
}


@pytest.mark.parametrize("name", SOURCES)
def test_ids_equal_transformers(compare, name):
    texts = SOURCES[name]()
    while group := list(itertools.islice(texts, 2000)):
        compare(group)


def test_calling_transformers_gives_what_its_backend_gives(real, oracle):
    texts = list(mixtures(500)) + list(itertools.islice(look_alikes(), 500))
    assert oracle(texts).input_ids == real.encode_batch(texts, allow_control=True)


def test_these_are_200_000_strings():
    assert sum(1 for source in SOURCES.values() for _ in source()) >= 200_000


def test_ids_equal_transformers_on_drawn_text(compare):
    character = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(PIECES + NAMES))
    text = st.lists(character, max_size=30).map("".join)

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(st.lists(text, min_size=10, max_size=20))
    def check(texts):
        compare(texts)

    check()


@pytest.mark.parametrize("line", [
    "the quick brown fox " * 50_000, "a" * 1_000_000, " " * 1_000_000, "\u3000" * 1_000_000 + "x",
    "x" + " \t" * 500_000 + "\ny", "7" * 200_000, "é" * 500_000, "e\u0301" * 300_000,
    "\n" * 1_000_000 + "x", "!" * 1_000_000, "<|im_end|>" * 100_000, "漢字かな" * 80_000,
], ids=lambda line: repr(line[:6]))  # fmt: skip
def test_a_line_of_a_megabyte(compare, line):
    compare([line])


def test_decoding_any_bytes_equals_transformers(real, oracle):
    """Ids in any order spell bytes that are no UTF-8; whole and streamed."""
    rng = random.Random(2)
    wide = [i for i in range(real.vocab_size) if any(b > 127 for b in real.token_bytes(i))]
    for n in range(20_000):
        pool = (range(256), range(188, 256), wide, range(real.vocab_size))[n % 4]
        ids = rng.choices(pool, k=rng.randint(1, 12))
        for skip in (False, True):
            theirs = oracle.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert real.decode(ids, skip_special_tokens=skip) == theirs
            stream = real.stream(skip)
            assert "".join([*map(stream.push, ids), stream.finish()]) == theirs
