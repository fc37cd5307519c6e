"""Passkey retrieval by depth and length: the long-context test the report starts from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qwenlib.data.retrieval import passkey_text
from qwenlib.generation import generate
from qwenlib.tokenizer import Tokenizer


@dataclass(frozen=True)
class PasskeyScore:
    """Share of keys found at one length (tokens, answer included) and depth (0 start … 1 end)."""

    length: int
    depth: float
    accuracy: float
    trials: int


def filler_for_length(tokenizer: Tokenizer, length: int) -> int:
    """Most sentences of noise with which prompt and answer still fit in `length` tokens."""

    def size(sentences: int) -> int:
        worst = 0
        for seed in range(4):
            text, key = passkey_text(sentences, 0.5, random.Random(seed))
            worst = max(worst, len(tokenizer.encode(f"{text} {key}.")))
        return worst + 4  # keys and sentence boundaries differ by a few tokens

    if size(0) > length:
        raise ValueError(f"a passkey prompt needs {size(0)} tokens, more than {length}")
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle - 1)
    return low


def passkey_accuracy(
    model, tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[float], trials: int,
    seed: int,
) -> list[PasskeyScore]:  # fmt: skip
    """Greedy exact match of the whole key, `trials` fresh keys for each length and depth."""
    scores = []
    for length in lengths:
        sentences = filler_for_length(tokenizer, length)
        rng = random.Random(f"{seed}/{length}")
        cases = [(depth, *passkey_text(sentences, depth, rng)) for depth in depths
                 for _ in range(trials)]  # fmt: skip
        prompts = [tokenizer.encode(text) for _, text, _ in cases]
        out = generate(model, prompts, 8, eos_ids=(tokenizer.end_of_text_id,), batch_size=64)
        for i, depth in enumerate(depths):
            chosen = range(i * trials, (i + 1) * trials)
            hits = sum(_is_key(tokenizer.decode(out.completions[j]), cases[j][2]) for j in chosen)
            scores.append(PasskeyScore(length, float(depth), hits / trials, trials))
    return scores


def _is_key(text: str, key: str) -> bool:
    """The first run of digits is the key, and no longer."""
    digits = ""
    for character in text.strip():
        if not character.isdigit():
            break
        digits += character
    return digits == key


def mean_accuracy(scores: Sequence[PasskeyScore], length: int) -> float:
    """Accuracy at one length over all depths."""
    chosen = [score.accuracy for score in scores if score.length == length]
    if not chosen:
        raise ValueError(f"no score at length {length}")
    return sum(chosen) / len(chosen)
