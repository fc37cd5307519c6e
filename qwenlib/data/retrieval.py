"""Synthetic retrieval text: facts stated among filler and asked for later.

Natural text seldom rewards looking far back, so long-context recipes mix in keyword retrieval
(Qwen2.5-1M, arXiv 2501.15383). These pages teach it at the training length; `passkey` is the
classic test form (one number in a haystack of noise).
"""

import random
from collections.abc import Iterator, Sequence

from qwenlib.data.corpora import Document

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NOISE_SENTENCES = tuple(part.strip() + "." for part in NOISE.split(".") if part.strip())


def needle_line(key: str) -> str:
    """The statement that hides in the noise."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


QUESTION = "What is the pass key? The pass key is"


def draw_key(rng: random.Random) -> str:
    """Five different digits; chance of guessing them is 1 in 27,216.

    They differ so that each digit names the next one: a repeated digit would have two successors,
    and a small model learns the copying head that retrieval needs much later.
    """
    while True:
        digits = rng.sample("0123456789", 5)
        if digits[0] != "0":
            return "".join(digits)


def passkey_text(filler_sentences: int, depth: float, rng: random.Random) -> tuple[str, str]:
    """(prompt, key): a needle after `depth` (0 … 1) of the filler, then the question."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    return _page(filler_sentences, [depth], rng)


def _page(filler_sentences: int, depths: Sequence[float], rng: random.Random) -> tuple[str, str]:
    """The same key said at each of the depths."""
    key = draw_key(rng)
    start = rng.randrange(len(_NOISE_SENTENCES))
    lines = [_NOISE_SENTENCES[(start + i) % len(_NOISE_SENTENCES)] for i in range(filler_sentences)]
    for place in sorted((round(depth * filler_sentences) for depth in depths), reverse=True):
        lines.insert(place, needle_line(key))
    return " ".join([*lines, QUESTION]), key


def repeat_text(count: int, rng: random.Random) -> str:
    """`count` invented words, then the same once more: half of the page follows from the other."""
    words = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
             for _ in range(count)]  # fmt: skip
    line = " ".join(words)
    return f"Read and repeat: {line}. Again: {line}."


def corpus_documents(
    seed: int, limit_mb: float, max_filler: int = 8, max_mentions: int = 3
) -> Iterator[Document]:
    """Passkey pages with their answers, and as many pages of words said twice.

    A passkey page has 0 … `max_filler` sentences of noise and says its key up to `max_mentions`
    times. Only copied tokens teach to look back, and in such a page they are few: in a model of a
    million parameters the copying head then appears late, or not at all. Repeated words are dense
    with them.
    """
    rng = random.Random(seed)
    budget, page = limit_mb * 1e6, 0
    while budget > 0:
        if page % 2:
            text = repeat_text(rng.randint(8, 20), rng)
        else:
            depths = [rng.random() for _ in range(rng.randint(1, max_mentions))]
            prompt, key = _page(rng.randint(0, max_filler), depths, rng)
            text = f"{prompt} {key}."
        budget -= len(text.encode())
        yield Document(f"retrieval-{seed}-{page}", text, "retrieval", "retrieval", "en")
        page += 1
