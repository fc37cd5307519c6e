"""Deciding how much of each source a model reads: split, shares, down- and up-sampling."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from qwenlib.data.corpora import Document


@dataclass(frozen=True)
class Share:
    """One source of a mixture, in tokens; `epochs` over 1 means that text is repeated."""

    source: str
    available: int
    share_before: float
    target: int
    weight: float

    @property
    def epochs(self) -> float:
        return self.target / self.available if self.available else 0.0


def split(
    documents: Sequence[Document], heldout_share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(train, held-out) by a hash of the document's group: pieces of one file stay together.

    A document's side depends on nothing but its own group and the seed. Deduplicate first, or a
    near copy can lie on the other side.
    """
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share is {heldout_share}, it must lie between 0 and 1")
    train, heldout = [], []
    for document in documents:
        (heldout if _uniform(seed, document.group) < heldout_share else train).append(document)
    return train, heldout


def plan(
    available: Mapping[str, int],
    weights: Mapping[str, float],
    total_tokens: int,
    max_epochs: float = 4.0,
) -> list[Share]:
    """Tokens to take from each source so that the shares are `weights` (normalised to sum 1).

    More than about four passes over the same text stop paying (arXiv 2305.16264): a source that
    would need more than `max_epochs` raises ValueError, as do unknown sources and bad weights.
    """
    if unknown := set(weights) - set(available):
        raise ValueError(f"no documents for {', '.join(sorted(unknown))}; drop its weight to 0")
    norm = sum(weights.values())
    if norm <= 0 or min(weights.values()) < 0:
        raise ValueError(f"weights must be non-negative and not all zero, got {dict(weights)}")
    total = sum(available.values())
    shares = []
    for source, tokens in available.items():
        weight = weights.get(source, 0.0) / norm
        share = Share(source, tokens, tokens / total, round(weight * total_tokens), weight)
        if share.target > max_epochs * tokens:
            raise ValueError(
                f"source {source!r} has {tokens:,} tokens, its weight {weight:.2f} asks for "
                f"{share.target:,}: over {max_epochs:g} epochs; lower the weight or collect more"
            )
        shares.append(share)
    return shares


def draw(
    documents: Sequence[Document], lengths: Sequence[int], target: int, seed: int
) -> list[int]:
    """Indices of documents with `target` tokens in all, rounded up to a whole document.

    The order is that of a hash of (seed, pass, id), so a larger target extends a smaller one, and
    a new document moves no other. Beyond one pass every document repeats before any does twice.
    """
    total = sum(lengths)
    if target > 0 and total == 0:
        raise ValueError(f"{target:,} tokens wanted from no documents")
    chosen, taken, epoch = [], 0, 0
    while taken < target:
        keys = [_uniform(seed, f"{epoch}/{d.id}") for d in documents]
        for index in sorted(range(len(documents)), key=keys.__getitem__):
            if taken >= target:
                break
            chosen.append(index)
            taken += lengths[index]
        epoch += 1
    return chosen


def interleave(parts: Mapping[str, Sequence], seed: int) -> list:
    """All entries of all parts in one shuffled list."""
    merged = [entry for name in sorted(parts) for entry in parts[name]]
    random.Random(f"interleave/{seed}").shuffle(merged)
    return merged


def _uniform(seed: int, key: str) -> float:
    digest = sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
