"""Decontamination by the report's rule, made usable on long documents and large corpora.

Report §3 (from Qwen2, arXiv 2407.10671): a training sequence s_t is removed if a test sequence
s_e exists with |LCS(s_t, s_e)| >= 13 and |LCS(s_t, s_e)| >= 0.6 min(|s_t|, |s_e|), where LCS is
the longest common *subsequence* of tokens. Tokens here are normalised words.

On a long s_t the rule fires by chance (any 40 common words occur in order somewhere in a book), so
documents are tested window by window, and only against items they share a telling n-gram with.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from qwenlib.data.words import members, ngram_hashes, word_hashes, words

MIN_LCS, MIN_SHARE = 13, 0.6  # the report's two constants
_SHORTEST_ITEM = 5  # words; a shorter test item is in half of all text


def lcs_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004).

    Bit i of V is 0 where the LCS of a[:i+1] with the b read so far is longer than that of a[:i];
    one token of b costs a few operations on integers of len(a) bits.
    """
    return _lcs_length(_positions(a), len(a), b)


def _positions(a: Sequence) -> dict:
    """Token -> integer whose bit i says that a[i] is that token."""
    where: dict = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    return where


def _lcs_length(where: Mapping, size: int, b: Sequence) -> int:
    full = (1 << size) - 1
    v = full
    for token in b:
        match = where.get(token)
        if match:
            u = v & match
            v = ((v + u) | (v - u)) & full
    return size - v.bit_count()


def is_match(s_t: Sequence, s_e: Sequence) -> bool:
    """The report's rule as printed: LCS >= 13 tokens and >= 0.6 of the shorter sequence."""
    need = max(MIN_LCS, MIN_SHARE * min(len(s_t), len(s_e)))
    return lcs_length(s_e, s_t) >= need


def is_match_windowed(s_t: Sequence, s_e: Sequence) -> bool:
    """The rule on windows of 2 |s_e| tokens, half of |s_e| apart, so length gives no false hits."""
    width, stride = 2 * len(s_e), max(1, len(s_e) // 2)
    if len(s_t) <= width:
        return is_match(s_t, s_e)
    need = max(MIN_LCS, MIN_SHARE * len(s_e))
    where = _positions(s_e)
    # An LCS has at most as many tokens as the window has tokens of the item: most windows end here.
    known = [0, *accumulate(token in where for token in s_t)]
    for start in [*range(0, len(s_t) - width, stride), len(s_t) - width]:
        if known[start + width] - known[start] >= need:
            if _lcs_length(where, len(s_e), s_t[start : start + width]) >= need:
                return True
    return False


@dataclass(frozen=True)
class Match:
    """Why a document was removed."""

    benchmark: str
    item: int
    rule: str  # "lcs" or "exact"


class ContaminationIndex:
    """Test items of several benchmarks, ready to be looked for in many documents.

    Items of 13 words and more are matched by the windowed LCS rule if the document shares one
    `ngram` with them that at most `max_frequency` items contain (a prompt's fixed wording is no
    evidence). Shorter items must occur word for word; below 5 words they are left out and counted
    in `skipped`.
    """

    def __init__(
        self, benchmarks: Mapping[str, Sequence[str]], ngram: int = 5, max_frequency: int = 5
    ):
        if not 1 <= ngram <= MIN_LCS:
            raise ValueError(f"ngram is {ngram}, it must lie in 1 to {MIN_LCS} (the LCS minimum)")
        self.ngram = ngram
        self.items: list[tuple[str, int, list[str]]] = []  # benchmark, number in it, words
        self.skipped = 0
        for name, texts in benchmarks.items():
            for number, text in enumerate(texts):
                tokens = words(text)
                if len(tokens) < _SHORTEST_ITEM:
                    self.skipped += 1
                else:
                    self.items.append((name, number, tokens))
        by_ngram, anchors = self._gate(max_frequency), self._anchors()
        self._by_ngram, self._anchor_at = by_ngram, anchors
        self._keys = np.array(sorted(by_ngram), dtype=np.uint64)
        self._anchor_keys = np.array(sorted(anchors), dtype=np.uint64)

    def _gate(self, max_frequency: int) -> dict[int, list[int]]:
        """Telling n-gram -> the long items that contain it."""
        found: dict[int, list[int]] = {}
        for index, (_, _, tokens) in enumerate(self.items):
            if len(tokens) >= MIN_LCS:
                for key in set(ngram_hashes(word_hashes(tokens), self.ngram).tolist()):
                    found.setdefault(key, []).append(index)
        return {key: items for key, items in found.items() if len(items) <= max_frequency}

    def _anchors(self) -> dict[int, list[tuple[int, int]]]:
        """For each item its rarest 5-gram -> (item, offset): where to look for the whole item."""
        grams = [ngram_hashes(word_hashes(t), _SHORTEST_ITEM).tolist() for _, _, t in self.items]
        frequency = Counter(key for keys in grams for key in keys)
        found: dict[int, list[tuple[int, int]]] = {}
        for index, keys in enumerate(grams):
            offset = min(range(len(keys)), key=lambda i: frequency[keys[i]])
            found.setdefault(keys[offset], []).append((index, offset))
        return found

    def find(self, text: str) -> Match | None:
        """The first test item this document contains under the windowed rule, else None."""
        tokens = words(text)
        exact = self._find_exact(tokens, below=MIN_LCS)
        if exact is not None:
            return self._match(exact, "exact")
        for index in self.candidates(tokens):
            if is_match_windowed(tokens, self.items[index][2]):
                return self._match(index, "lcs")
        return None

    def find_exact(self, text: str) -> Match | None:
        """The first test item that occurs word for word, whatever its length.

        For text generated from the templates of the test items, where the LCS rule sees the
        template instead of the question.
        """
        index = self._find_exact(words(text), below=None)
        return None if index is None else self._match(index, "exact")

    def candidates(self, tokens: Sequence[str]) -> list[int]:
        """Items that share a telling n-gram with the document, ascending."""
        hashes = ngram_hashes(word_hashes(tokens), self.ngram)
        hits = set(hashes[members(hashes, self._keys)].tolist())
        return sorted({index for key in hits for index in self._by_ngram[key]})

    def _find_exact(self, tokens: list[str], below: int | None) -> int | None:
        hashes = ngram_hashes(word_hashes(tokens), _SHORTEST_ITEM)
        for at in members(hashes, self._anchor_keys):
            for index, offset in self._anchor_at[int(hashes[at])]:
                item, start = self.items[index][2], int(at) - offset
                if below is not None and len(item) >= below:
                    continue
                if start >= 0 and tokens[start : start + len(item)] == item:
                    return index
        return None

    def _match(self, index: int, rule: str) -> Match:
        name, number, _ = self.items[index]
        return Match(name, number, rule)


def edit(tokens: Sequence[str], rate: float, rng: random.Random) -> list[str]:
    """Tokens with a share `rate` of them substituted, deleted or preceded by an insertion."""
    edited = []
    for token in tokens:
        kind = rng.randrange(3) if rng.random() < rate else None
        noise = f"noise{rng.randrange(10**6)}"
        edited += {None: [token], 0: [noise], 1: [], 2: [noise, token]}[kind]
    return edited


def planted_recall(
    index: ContaminationIndex, hosts: Sequence[str], rates: Sequence[float], count: int, seed: int
) -> dict[float, float]:
    """Share of `count` planted test items that are found again, for each edit rate.

    An item is drawn, edited, and put at a random place of a random host document.
    """
    if not hosts or not index.items:
        raise ValueError("planting needs at least one host document and one test item")
    recall = {}
    for rate in rates:
        rng = random.Random(f"{seed}/{rate}")
        found = 0
        for _ in range(count):
            tokens = rng.choice(index.items)[2]
            host = words(rng.choice(hosts))
            at = rng.randint(0, len(host))
            document = host[:at] + edit(tokens, rate, rng) + host[at:]
            found += index.find(" ".join(document)) is not None
        recall[rate] = found / count
    return recall
