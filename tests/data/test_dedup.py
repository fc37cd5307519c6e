import random
from hashlib import blake2b
from itertools import permutations

import numpy as np
import pytest

from qwenlib.data import dedup
from qwenlib.data.corpora import Document
from qwenlib.data.dedup import catch_probability, drop_exact, drop_near, jaccard, nearest, shingles
from qwenlib.data.words import ngram_hashes, word_hashes, words


def document(id, text):
    return Document(id, text, "prose", "test", "en")


def random_text(rng, length=200):
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(length))


def changed(text, share, rng):
    return " ".join("x" + w[1:] if rng.random() < share else w for w in text.split())


@pytest.fixture
def corpus():
    """60 different texts; ten of them with a near copy (1 % of words changed) that is shorter."""
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(60)]
    docs = [document(f"d{i:02d}", text) for i, text in enumerate(texts)]
    copies = [document(f"a{i:02d}", changed(texts[i], 0.01, rng)[:-8]) for i in range(10)]
    return docs, copies


def naive_jaccard(a, b, n=5):
    sets = []
    for text in (a, b):
        tokens = words(text)
        sets.append({tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_words():
    assert words("It's 15 - 43, e.g. ﬁne_name!") == [
        "it",
        "s",
        "15",
        "-",
        "43",
        "e",
        "g",
        "fine_name",
    ]
    assert words("東京 Tower 2") == ["東", "京", "tower", "2"]


def test_ngram_hashes_are_equal_exactly_for_equal_runs():
    rng = random.Random(1)
    tokens = [rng.choice("abc") for _ in range(300)]
    for n in (1, 2, 5, 40):
        hashes = ngram_hashes(word_hashes(tokens), n).tolist()
        runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        assert len(hashes) == len(runs)
        assert len(set(zip(hashes, runs, strict=True))) == len(set(runs)) == len(set(hashes))
    assert len(ngram_hashes(word_hashes(["a"]), 2)) == 0
    # Golden, and Σ h_k B^k in Python integers: the same on every machine and version.
    a, b = (
        int.from_bytes(blake2b(word, digest_size=8).digest(), "little") for word in (b"a", b"b")
    )
    expected = (a + b * 0x9E3779B97F4A7C15) % 2**64
    assert expected == 1287047052646305044
    assert ngram_hashes(word_hashes(["a", "b"]), 2).tolist() == [expected]


def test_jaccard_equals_sets_of_tuples(corpus):
    docs, copies = corpus
    for a, b in [(docs[0], copies[0]), (docs[3], copies[3]), (docs[0], docs[1])]:
        measured = jaccard(shingles(a.text), shingles(b.text))
        assert measured == pytest.approx(naive_jaccard(a.text, b.text))
    assert jaccard(shingles("one two"), shingles("one two")) == 1.0
    assert jaccard(shingles("one two"), shingles("one three")) == 0.0


def test_near_copies_are_found_and_the_longest_stays(corpus):
    docs, copies = corpus
    result = drop_near([*copies, *docs])
    assert result.kept == docs
    assert result.dropped == {f"a{i:02d}": f"d{i:02d}" for i in range(10)}
    assert len(result.pairs) == 10 <= result.candidates
    assert all(s >= 0.7 for _, _, s in result.pairs)
    assert result.largest_cluster == 2


def test_order_does_not_matter(corpus):
    docs, copies = corpus
    both = [*docs, *copies]
    expected = drop_near(both).dropped
    for seed in range(3):
        random.Random(seed).shuffle(both)
        assert drop_near(both).dropped == expected


def test_proposals_below_the_threshold_stay():
    rng = random.Random(2)
    text = random_text(rng, 400)
    # Every 25th word changed: about a fifth of the 5-grams each, Jaccard about 0.66.
    other = " ".join("x" if i % 25 == 0 else w for i, w in enumerate(text.split()))
    pair = [document("1", text), document("2", other)]
    similarity = naive_jaccard(text, other)
    assert 0.6 < similarity < 0.7
    assert drop_near(pair, 0.7, bands=60, rows=2).dropped == {}
    assert drop_near(pair, 0.6, bands=60, rows=2).dropped == {"2": "1"}


def test_a_chain_is_one_cluster():
    tokens = [f"w{i}" for i in range(120)]
    texts = [" ".join(tokens[8 * k : 8 * k + 90]) for k in range(3)]
    assert naive_jaccard(texts[0], texts[2]) < 0.7 < naive_jaccard(texts[0], texts[1])
    for ids in permutations("012"):  # whichever of the three is met first
        chain = [document(id, text) for id, text in zip(ids, texts, strict=True)]
        result = drop_near(chain, threshold=0.7, bands=60, rows=2)
        assert len(result.kept) == 1 and result.largest_cluster == 3


def test_exact_copies_up_to_white_space_keep_the_smallest_id():
    docs = [document("b", "one  two\n"), document("a", "one two"), document("c", "one three")]
    result = drop_exact(docs)
    assert [d.id for d in result.kept] == ["a", "c"] and result.dropped == {"b": "a"}


def test_catch_probability_is_the_measured_frequency():
    """P(s) = 1 - (1 - s^r)^b with real sketches, at a similarity in the steep part."""
    rng = random.Random(5)
    hits, similarities = 0, []
    for k in range(150):
        text = random_text(rng, 120)
        other = " ".join("other" if i == 60 or i == 20 else w for i, w in enumerate(text.split()))
        similarities.append(naive_jaccard(text, other))
        result = drop_near(
            [document("1", text), document("2", other)], 0.5, bands=5, rows=8, seed=k
        )
        hits += result.candidates
    expected = float(np.mean(catch_probability(similarities, 5, 8)))
    assert 0.5 < expected < 0.95
    assert abs(hits / 150 - expected) < 4 * (expected * (1 - expected) / 150) ** 0.5


def test_nearest_is_exact(corpus):
    docs, copies = corpus
    for copy, (id, similarity) in zip(copies, nearest(copies, docs), strict=True):
        best = max(docs, key=lambda d: naive_jaccard(copy.text, d.text))
        assert id == best.id == "d" + copy.id[1:]
        assert similarity == pytest.approx(naive_jaccard(copy.text, best.text))
    assert nearest(copies[:1], []) == [("", 0.0)]


def test_bad_arguments_are_named(corpus):
    docs, _ = corpus
    with pytest.raises(ValueError, match="threshold is 1.5"):
        drop_near(docs, 1.5)
    with pytest.raises(ValueError, match="'d00' occurs twice"):
        drop_near([docs[0], docs[1], docs[0]])


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("if similarity >= threshold:", "if True:"),
        ("key=lambda d: (-len(d.text), d.id)", "key=lambda d: d.id"),
        ("ordered = sorted(documents, key=lambda d: d.id)", "ordered = list(documents)"),
        ("self.parent[high] = low", "self.parent[j] = i"),
    ],
)
def test_a_broken_line_is_noticed(line, broken, mutated, corpus, monkeypatch):
    module = mutated(dedup, line, broken)
    monkeypatch.setitem(globals(), "drop_near", module.drop_near)
    tests = [
        lambda: test_near_copies_are_found_and_the_longest_stays(corpus),
        lambda: test_order_does_not_matter(corpus),
        test_proposals_below_the_threshold_stay,
        test_a_chain_is_one_cluster,
        lambda: test_bad_arguments_are_named(corpus),
    ]
    failed = 0
    for test in tests:
        try:
            test()
        except (AssertionError, pytest.fail.Exception):
            failed += 1
    assert failed
