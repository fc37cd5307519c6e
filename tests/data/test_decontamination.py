"""The report's rule at its boundaries, the bit-parallel LCS against its table, planted leaks."""

import random

import pytest

from qwenlib.data import decontamination
from qwenlib.data.decontamination import (
    ContaminationIndex,
    edit,
    is_match,
    is_match_windowed,
    lcs_length,
    planted_recall,
)


def table_lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            row[j], diagonal = (diagonal + 1 if x == y else max(row[j], row[j - 1])), row[j]
    return row[-1]


def check_lcs(lcs_length):
    rng = random.Random(0)
    for _ in range(300):
        size = rng.choice([2, 5, 30])
        a, b = ([rng.randrange(size) for _ in range(rng.randrange(90))] for _ in range(2))
        assert lcs_length(a, b) == table_lcs(a, b) == lcs_length(b, a)


def test_lcs_equals_the_table():
    check_lcs(lcs_length)


@pytest.mark.parametrize("broken", ["v = (v - u) & full", "v = (v + u) & full"])
def test_a_broken_bit_operation_is_noticed(broken, mutated):
    with pytest.raises(AssertionError):
        check_lcs(mutated(decontamination, "v = ((v + u) | (v - u)) & full", broken).lcs_length)


def test_lcs_longer_than_a_machine_word():
    a = list(range(200))
    assert lcs_length(a, a) == 200
    assert lcs_length(a, a[::2]) == 100
    assert lcs_length(a, a[::-1]) == 1
    assert lcs_length([], a) == 0


def shared(common: int, train: int, test: int):
    """Sequences of these lengths with an LCS of exactly `common`."""
    s_t = [f"c{i}" for i in range(common)] + [f"t{i}" for i in range(train - common)]
    s_e = [f"e{i}" for i in range(test - common)] + [f"c{i}" for i in range(common)]
    return s_t, s_e


BOUNDARY = [
    (13, 100, 13, True),  # 13 of 13
    (12, 100, 12, False),  # a whole item, but under 13 tokens
    (12, 100, 20, False),  # exactly 0.6, but under 13
    (15, 100, 25, True),  # exactly 0.6
    (14, 100, 25, False),  # under 0.6
    (15, 25, 100, True),  # the shorter side may be the training text
    (30, 100, 50, True),
    (29, 100, 50, False),
]


def check_boundaries(rule):
    for common, train, test, expected in BOUNDARY:
        assert rule(*shared(common, train, test)) == expected, (common, train, test)


def test_the_rule_at_its_boundaries():
    check_boundaries(is_match)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("MIN_LCS, MIN_SHARE = 13, 0.6", "MIN_LCS, MIN_SHARE = 12, 0.6"),
        ("MIN_LCS, MIN_SHARE = 13, 0.6", "MIN_LCS, MIN_SHARE = 14, 0.6"),
        ("lcs_length(s_e, s_t) >= need", "lcs_length(s_e, s_t) > need"),
        ("MIN_SHARE * min(len(s_t), len(s_e))", "MIN_SHARE * max(len(s_t), len(s_e))"),
        ("need = max(MIN_LCS,", "need = min(MIN_LCS,"),
    ],
)
def test_a_threshold_that_is_off_by_one_is_noticed(line, broken, mutated):
    with pytest.raises(AssertionError):
        check_boundaries(mutated(decontamination, line, broken).is_match)


def test_windowed_rule_equals_the_rule_on_every_window():
    rng = random.Random(0)
    hits = 0
    for _ in range(300):
        item = [rng.randrange(40) for _ in range(rng.randint(13, 30))]
        text = [rng.randrange(40) for _ in range(rng.randint(20, 200))]
        at = rng.randrange(len(text))
        text[at:at] = [t for t in item if rng.random() < 0.7]
        width, stride = 2 * len(item), len(item) // 2
        last = max(len(text) - width, 0)
        starts = {*range(0, last, stride), last}
        expected = any(is_match(text[s : s + width], item) for s in starts)
        assert is_match_windowed(text, item) == expected
        hits += expected
    assert 50 < hits < 250


def test_windows_find_a_leak_anywhere_in_a_long_text():
    item = [f"q{i}" for i in range(30)]
    noise = [f"n{i}" for i in range(1000)]
    for at in range(0, 1001, 7):
        assert is_match_windowed(noise[:at] + item + noise[at:], item)


def test_a_scattered_subsequence_is_a_literal_hit_and_no_windowed_one():
    item = [f"q{i}" for i in range(30)]
    scattered = [word for token in item for word in [token, *(["x"] * 20)]]
    assert is_match(scattered, item)
    assert not is_match_windowed(scattered, item)


QUESTION = (
    "A farmer has twelve cows and sells five of them to his neighbour; how many are left now?"
)


def test_index_finds_and_names_the_item():
    index = ContaminationIndex({"a": ["too short"], "b": ["unrelated " * 20, QUESTION]})
    assert index.skipped == 1
    text = "Some text before. " + QUESTION.upper().replace(" ", "\n") + " And more after it. " * 50
    match = index.find(text)
    assert (match.benchmark, match.item, match.rule) == ("b", 1, "lcs")
    assert index.find("Some text before. And more after it. " * 50) is None


def test_short_items_match_word_for_word_only():
    index = ContaminationIndex({"b": ["What is 15 - 43 + 2 ?"]})
    assert index.find("Q: what is 15 - 43 + 2? A: -26").rule == "exact"
    assert index.find("Q: what is 15 + 43 - 2? A: 56") is None
    assert index.find("Q: what is 15 - 43 + 20?") is None


def test_find_exact_equals_a_search_at_every_place():
    rng = random.Random(0)
    items = [" ".join(rng.choices("abcd", k=rng.randint(5, 9))) for _ in range(60)]
    index = ContaminationIndex({"b": items})
    hits = 0
    for _ in range(200):
        text = " ".join(rng.choices("abcd", k=40))
        inside = any(f" {item} " in f" {text} " for item in items)
        match = index.find_exact(text)
        assert (match is not None) == inside
        assert match is None or f" {items[match.item]} " in f" {text} "
        hits += inside
    assert 20 < hits < 200


def test_fixed_wording_of_many_items_is_no_evidence():
    template = "Solve the following problem step by step and give only the result at the end"
    items = [f"{template} : {a} * {a + 1}" for a in range(100, 120)]
    index = ContaminationIndex({"b": items}, max_frequency=5)
    from qwenlib.data.words import words

    assert index.candidates(words(f"{template} of the page")) == []
    assert index.find_exact(f"{template} : 7 * 8") is None
    assert index.find_exact(f"Page. {template} : 104 * 105. Answer").item == 4


def test_edit_rates():
    tokens = [str(i) for i in range(2000)]
    assert edit(tokens, 0, random.Random(0)) == tokens
    kept = lcs_length(tokens, edit(tokens, 0.3, random.Random(0))) / len(tokens)
    assert 0.77 < kept < 0.83  # 0.3 edits, of which a third (insertions) lose nothing


def test_planted_recall_falls_with_edits():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    items = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(20)]
    hosts = [" ".join(rng.choices(vocabulary, k=500)) for _ in range(20)]
    index = ContaminationIndex({"b": items})
    assert not any(index.find(host) for host in hosts)
    recall = planted_recall(index, hosts, (0.0, 0.1, 0.9), count=40, seed=0)
    assert recall[0.0] == 1.0 and recall[0.1] >= 0.95 and recall[0.9] == 0.0
    with pytest.raises(ValueError, match="at least one host"):
        planted_recall(index, [], (0.0,), 1, 0)
    with pytest.raises(ValueError, match="ngram is 14"):
        ContaminationIndex({"b": items}, ngram=14)
