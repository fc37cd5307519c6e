"""Deduplication: exact copies by hash, near copies by MinHash LSH with exact verification.

Word n-grams make a document a set; J(A, B) = |A ∩ B| / |A ∪ B|. LSH with b bands of r rows
proposes a pair of similarity s with probability 1 - (1 - s^r)^b; every proposed pair is then
measured exactly, so a false positive of the sketch never removes a document.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from qwenlib.data.corpora import Document
from qwenlib.data.words import ngram_hashes, word_hashes, words

NGRAM, BANDS, ROWS = 5, 14, 8  # datatrove's defaults: half of all pairs at s = 0.68 are proposed


@dataclass(frozen=True)
class DedupResult:
    """What stays, in the given order, and for each dropped document the kept one it equals."""

    kept: list[Document]
    dropped: dict[str, str]  # id -> id of the document kept in its place
    pairs: list[tuple[str, str, float]]  # verified near-duplicates with their Jaccard similarity
    candidates: int  # pairs that LSH proposed

    @property
    def largest_cluster(self) -> int:
        """Documents in the largest group of duplicates, the kept one included (1: none)."""
        return 1 + max(Counter(self.dropped.values()).values(), default=0)


def shingles(text: str, n: int = NGRAM) -> np.ndarray:
    """Sorted unique n-gram hashes, uint64; a text shorter than n words is one shingle."""
    tokens = words(text)
    return np.unique(ngram_hashes(word_hashes(tokens), min(n, max(len(tokens), 1))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted unique arrays; two empty sets count as equal."""
    if not len(a) and not len(b):
        return 1.0
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def catch_probability(similarity, bands: int = BANDS, rows: int = ROWS):
    """Probability that LSH proposes a pair of this similarity: 1 - (1 - s^r)^b."""
    return 1 - (1 - np.asarray(similarity, dtype=float) ** rows) ** bands


def drop_exact(documents: Sequence[Document]) -> DedupResult:
    """Drop copies that differ at most in white space; the smallest id of a group stays."""
    keeper: dict[bytes, str] = {}
    digests = [sha256(" ".join(d.text.split()).encode()).digest() for d in documents]
    for document, digest in zip(documents, digests, strict=True):
        keeper[digest] = min(document.id, keeper.get(digest, document.id))
    dropped = {
        d.id: keeper[digest]
        for d, digest in zip(documents, digests, strict=True)
        if keeper[digest] != d.id
    }
    return DedupResult([d for d in documents if d.id not in dropped], dropped, [], 0)


def drop_near(
    documents: Sequence[Document],
    threshold: float = 0.7,
    n: int = NGRAM,
    bands: int = BANDS,
    rows: int = ROWS,
    seed: int = 0,
) -> DedupResult:
    """Drop near copies (exact Jaccard >= threshold); the longest text of a cluster stays.

    Clusters are connected components, so a chain of small edits counts as one document. The
    result does not depend on the order of `documents`. Raises ValueError for repeated ids.
    """
    from datasketch import MinHash, MinHashLSH

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, a Jaccard similarity lies in (0, 1]")
    ordered = sorted(documents, key=lambda d: d.id)
    for a, b in zip(ordered, ordered[1:], strict=False):
        if a.id == b.id:
            raise ValueError(f"document id {a.id!r} occurs twice; ids must be unique")
    sets = [shingles(d.text, n) for d in ordered]
    # Shingles are hashes already: their low 32 bits go in as they are.
    sketch = MinHash(num_perm=bands * rows, seed=seed + 1, hashfunc=int)
    index = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    cluster = _UnionFind(len(ordered))
    pairs, candidates = [], 0
    for i, members in enumerate(sets):
        if not len(members):
            continue
        minhash = sketch.copy()
        minhash.update_batch((members & np.uint64(0xFFFFFFFF)).tolist())
        for j in sorted(index.query(minhash)):
            candidates += 1
            similarity = jaccard(members, sets[j])
            if similarity >= threshold:
                pairs.append((ordered[j].id, ordered[i].id, similarity))
                cluster.union(i, j)
        index.insert(i, minhash)
    groups: dict[int, list[Document]] = {}
    for i, document in enumerate(ordered):
        groups.setdefault(cluster.find(i), []).append(document)
    dropped = {}
    for members in groups.values():
        kept = min(members, key=lambda d: (-len(d.text), d.id))
        dropped |= {d.id: kept.id for d in members if d is not kept}
    return DedupResult([d for d in documents if d.id not in dropped], dropped, pairs, candidates)


def nearest(
    queries: Sequence[Document], corpus: Sequence[Document], n: int = NGRAM
) -> list[tuple[str, float]]:
    """(id, Jaccard) of the most similar corpus document for each query; exact, no sketch.

    Slower than LSH and without its misses: what proves that a held-out text has no near copy in
    the training text. ("", 0.0) for an empty corpus.
    """
    if not corpus:
        return [("", 0.0)] * len(queries)
    sets = [shingles(document.text, n) for document in corpus]
    sizes = np.array([len(members) for members in sets])
    flat = np.concatenate(sets)
    order = np.argsort(flat, kind="stable")
    flat, owners = flat[order], np.repeat(np.arange(len(sets)), sizes)[order]
    found = []
    for query in queries:
        wanted = shingles(query.text, n)
        begin = np.searchsorted(flat, wanted, side="left")
        end = np.searchsorted(flat, wanted, side="right")
        hits = [owners[i:j] for i, j in zip(begin, end, strict=True) if j > i]
        both = np.bincount(np.concatenate(hits), minlength=len(sets)) if hits else 0 * sizes
        similarity = both / np.maximum(len(wanted) + sizes - both, 1)
        best = int(np.argmax(similarity))
        found.append((corpus[best].id, float(similarity[best])))
    return found


class _UnionFind:
    def __init__(self, size: int):
        self.parent = list(range(size))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def union(self, i: int, j: int) -> None:
        low, high = sorted((self.find(i), self.find(j)))
        self.parent[high] = low
