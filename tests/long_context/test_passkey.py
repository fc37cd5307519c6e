"""Passkey scoring with models whose answers are known."""

import functools
import random

import pytest

from qwenlib.data.retrieval import passkey_text
from qwenlib.generation import Generation
from qwenlib.long_context import passkey
from qwenlib.long_context.passkey import (
    PasskeyScore,
    filler_for_length,
    mean_accuracy,
    passkey_accuracy,
)
from qwenlib.tokenizer import Tokenizer, train_bpe


@functools.cache
def tokenizer() -> Tokenizer:
    texts = [" ".join(passkey_text(10, 0.5, random.Random(i))) for i in range(20)]
    return Tokenizer.from_merges(train_bpe(texts, 340))


@pytest.mark.parametrize("length", [64, 200, 512])
def test_filler_fills_but_fits(length):
    """Prompt and answer fit at every depth, and little room is left."""
    sentences, longest = filler_for_length(tokenizer(), length), 0
    for seed in range(40):
        rng = random.Random(1000 + seed)
        text, key = passkey_text(sentences, rng.random(), rng)
        longest = max(longest, len(tokenizer().encode(f"{text} {key}.")))
    assert longest <= length
    assert longest > length - 24, "room for two more sentences is left unused"


def test_too_short_a_length_is_named():
    with pytest.raises(ValueError, match="needs .* tokens, more than 10"):
        filler_for_length(tokenizer(), 10)


def fake_generate(answer):
    """A generator that has read the prompt: answer(key, i) is what it says to prompt i."""

    def generate(model, prompts, max_new_tokens, eos_ids, batch_size):
        out = []
        for i, prompt in enumerate(prompts):
            text = tokenizer().decode(prompt)
            key = text.split("The pass key is ")[1][:5]
            out.append(tokenizer().encode(answer(key, i))[:max_new_tokens])
        return Generation(out, [True] * len(out))

    return generate


@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [
        (lambda key, i: f" {key}.", 1.0),
        (lambda key, i: f" {key}", 1.0),
        (lambda key, i: f" {key}1.", 0.0),  # a longer number is another key
        (lambda key, i: f" {key[:4]}.", 0.0),
        (lambda key, i: f" is {key}", 0.0),
        (lambda key, i: "", 0.0),
        (lambda key, i: f" {key}." if i % 2 else " 1.", 0.5),
    ],
)
def test_scores(answer, accuracy, monkeypatch):
    monkeypatch.setattr(passkey, "generate", fake_generate(answer))
    scores = passkey_accuracy(None, tokenizer(), [96, 128], [0.0, 0.5, 1.0], trials=4, seed=0)
    assert [(s.length, s.depth) for s in scores] == [
        (length, depth) for length in (96, 128) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(s.accuracy == accuracy and s.trials == 4 for s in scores)
    assert mean_accuracy(scores, 96) == accuracy


def test_scores_belong_to_their_depth(monkeypatch):
    """Only keys at the very start are answered: the first depth scores, the others do not."""
    seen = []

    def generate(model, prompts, *_, **__):
        texts = [tokenizer().decode(prompt) for prompt in prompts]
        seen.extend(texts)
        hits = [
            t.split("The pass key is ")[1][:5] if t.startswith("The pass") else "" for t in texts
        ]
        return Generation([tokenizer().encode(f" {hit}.") for hit in hits], [True] * len(hits))

    monkeypatch.setattr(passkey, "generate", generate)
    scores = passkey_accuracy(None, tokenizer(), [128], [1.0, 0.0, 0.5], trials=3, seed=0)
    assert [s.accuracy for s in scores] == [0.0, 1.0, 0.0]
    assert len(set(seen)) == 9, "fresh keys for each trial"


def test_mean_accuracy():
    scores = [PasskeyScore(64, 0.0, 1.0, 2), PasskeyScore(64, 1.0, 0.5, 2)]
    assert mean_accuracy(scores, 64) == 0.75
    with pytest.raises(ValueError, match="no score at length 128"):
        mean_accuracy(scores, 128)
