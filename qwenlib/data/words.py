"""Words and hashed word n-grams: the common ground of deduplication and decontamination."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

# Scripts without spaces count by character; operators count (15 - 43 is not 15 + 43), other
# punctuation does not.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(r"\w+|[-+*/=<>]+")
_WORD_UNSPACED = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[-+*/=<>]+")
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so powers of it stay invertible modulo 2^64


def words(text: str) -> list[str]:
    """Normalised words: NFKC, lower case, punctuation and spacing dropped."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    pattern = _WORD_UNSPACED if not text.isascii() and _HAS_UNSPACED.search(text) else _WORD
    return pattern.findall(text.lower())


@functools.lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def word_hashes(tokens: Sequence[str]) -> np.ndarray:
    """uint64 [len(tokens)]: one hash for each word, equal on every machine."""
    return np.fromiter(map(_word_hash, tokens), dtype=np.uint64, count=len(tokens))


@functools.lru_cache(maxsize=4)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """B^i and B^-i modulo 2^64 for i in 0 … size - 1."""
    inverse = np.uint64(pow(int(_BASE), -1, 2**64))
    both = [np.full(size, factor, dtype=np.uint64) for factor in (_BASE, inverse)]
    for powers in both:
        powers[0] = 1
    return np.cumprod(both[0]), np.cumprod(both[1])


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len(hashes) - n + 1]: one hash for each run of n words, from `word_hashes`.

    Run i hashes to Σ_k h_{i+k} B^k modulo 2^64, as a difference of prefix sums: O(1) a run.
    """
    if n < 1:
        raise ValueError(f"n-grams need n of at least 1, got {n}")
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    powers, inverses = _powers(1 << len(hashes).bit_length())
    prefix = np.zeros(len(hashes) + 1, dtype=np.uint64)
    np.cumsum(hashes * powers[: len(hashes)], out=prefix[1:])
    return (prefix[n:] - prefix[:-n]) * inverses[:count]


def members(hashes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Indices of the entries of `hashes` that are in the sorted array `keys`."""
    if not len(keys):
        return np.empty(0, dtype=np.int64)
    at = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
    return np.flatnonzero(keys[at] == hashes)
