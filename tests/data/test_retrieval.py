"""Passkey texts: the needle is where it should be, once, and the answer follows."""

import itertools
import random
import re

import pytest

from qwenlib.data.retrieval import QUESTION, corpus_documents, needle_line, passkey_text


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_needle_at_its_depth(depth):
    text, key = passkey_text(20, depth, random.Random(0))
    assert re.fullmatch(r"[1-9]\d{4}", key) and len(set(key)) == 5
    assert text.count(needle_line(key)) == 1 and text.endswith(QUESTION)
    before, after = text.removesuffix(QUESTION).split(needle_line(key))
    assert before.count(".") == round(20 * depth)
    assert before.count(".") + after.count(".") == 20
    assert not re.search(r"\d", before + after), "no other number to find"


def test_without_filler_and_bad_depth():
    text, key = passkey_text(0, 0.5, random.Random(1))
    assert text == f"{needle_line(key)} {QUESTION}"
    with pytest.raises(ValueError, match="depth"):
        passkey_text(3, 1.2, random.Random(0))


def test_corpus_is_seeded_bounded_and_answers_itself():
    documents = list(corpus_documents(3, 0.05))
    assert documents == list(corpus_documents(3, 0.05))
    assert documents[0] != next(corpus_documents(4, 0.05))
    size = sum(len(d.text.encode()) for d in documents)
    assert 50_000 <= size < 52_000
    assert len({d.id for d in documents}) == len(documents)
    assert len({d.text for d in itertools.islice(documents, 50)}) > 45
    mentions = set()
    for document in documents:
        keys = re.findall(r"\d+", document.text)
        assert len(set(keys)) == 1
        mentions.add(document.text.count(needle_line(keys[0])))
        assert len(keys) == 2 * document.text.count(needle_line(keys[0])) + 1
        assert document.text.endswith(f"{QUESTION} {keys[0]}.")
    assert mentions == {1, 2, 3}
