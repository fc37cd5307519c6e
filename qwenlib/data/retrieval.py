"""Synthetic retrieval text: facts stated among filler and asked for later.

Natural text seldom rewards looking far back, so long-context recipes mix in keyword retrieval
(Qwen2.5-1M, arXiv 2501.15383). These pages teach it at the training length; `passkey` is the
classic test form (one number in a haystack of noise).
"""

import random
from collections.abc import Iterator

from qwenlib.data.corpora import Document

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NOISE_SENTENCES = tuple(part.strip() + "." for part in NOISE.split(".") if part.strip())


def needle_line(key: str) -> str:
    """The statement that hides in the noise."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


QUESTION = "What is the pass key? The pass key is"


def draw_key(rng: random.Random) -> str:
    """A five-digit pass key; chance of guessing it is 1 in 90,000."""
    return str(rng.randint(10_000, 99_999))


def passkey_text(filler_sentences: int, depth: float, rng: random.Random) -> tuple[str, str]:
    """(prompt, key): a needle after `depth` (0 … 1) of the filler, then the question."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    key = draw_key(rng)
    before = round(depth * filler_sentences)
    start = rng.randrange(len(_NOISE_SENTENCES))
    noise = [_NOISE_SENTENCES[(start + i) % len(_NOISE_SENTENCES)] for i in range(filler_sentences)]
    lines = [*noise[:before], needle_line(key), *noise[before:], QUESTION]
    return " ".join(lines), key


_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")


def _word(rng: random.Random) -> str:
    """An invented name of two or three syllables, so that no association can be known by heart."""
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()


def records_text(entries: int, rng: random.Random) -> str:
    """A small table of names with numbers or names, then every entry asked for in another order."""
    values: dict[str, str] = {}
    while len(values) < entries:
        value = _word(rng) if rng.random() < 0.5 else str(rng.randint(0, 10 ** rng.randint(1, 4)))
        values[_word(rng)] = value
    asked = rng.sample(list(values), entries)
    lines = [f"{name} has {value}." for name, value in values.items()]
    lines += [f"What has {name}? {values[name]}." for name in asked]
    return "\n".join(lines)


def corpus_documents(seed: int, limit_mb: float, max_filler: int = 14) -> Iterator[Document]:
    """Pages in turn: passkey among 0 … `max_filler` sentences of noise, and tables of records."""
    rng = random.Random(seed)
    budget, page = limit_mb * 1e6, 0
    while budget > 0:
        if page % 2:
            text = records_text(rng.randint(2, 7), rng)
        else:
            prompt, key = passkey_text(rng.randint(0, max_filler), rng.random(), rng)
            text = f"{prompt} {key}."
        budget -= len(text.encode())
        yield Document(f"retrieval-{seed}-{page}", text, "retrieval", "retrieval", "en")
        page += 1
