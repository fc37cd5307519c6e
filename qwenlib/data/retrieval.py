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


def corpus_documents(
    seed: int, limit_mb: float, max_filler: int = 8, max_mentions: int = 3
) -> Iterator[Document]:
    """Passkey pages with their answers, with 0 … `max_filler` sentences of noise.

    A page says its key up to `max_mentions` times. A copied digit is the only thing here that
    teaches to look back, and with one mention nine tokens in ten teach nothing: in a model of a
    million parameters the copying head then appears late, or not at all.
    """
    rng = random.Random(seed)
    budget, page = limit_mb * 1e6, 0
    while budget > 0:
        depths = [rng.random() for _ in range(rng.randint(1, max_mentions))]
        prompt, key = _page(rng.randint(0, max_filler), depths, rng)
        text = f"{prompt} {key}."
        budget -= len(text.encode())
        yield Document(f"retrieval-{seed}-{page}", text, "retrieval", "retrieval", "en")
        page += 1
