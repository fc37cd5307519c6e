"""Byte-level BPE: the pre-token pattern, the bytes, a readable encoder (report section 2).

`trainer.py` makes the merges.
"""

import re
from collections.abc import Mapping, Sequence

import regex

from qwenlib.tokenizer.normal_form import normalise

Merge = tuple[bytes, bytes]

# The pattern published with Qwen2: contractions, letters with at most one leading symbol, single
# digits, punctuation runs with their newlines, line ends, white space.
PRETOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRETOKEN = regex.compile(PRETOKEN_PATTERN)
# The standard library's engine is twice as fast, but knows no classes of Unicode.
_ASCII_PRETOKEN = re.compile(
    PRETOKEN_PATTERN.replace(r"\p{L}\p{N}", "a-zA-Z0-9")
    .replace(r"\p{L}", "[a-zA-Z]")
    .replace(r"\p{N}", "[0-9]"),
    re.ASCII,
)

# Regular tokens 0 to 255 are the single bytes in GPT-2's order: printable ones first.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER: tuple[int, ...] = (
    *_PRINTABLE,
    *(b for b in range(256) if b not in set(_PRINTABLE)),
)
# tokenizer.json stores tokens as text: printable bytes stand for themselves, others are shifted.
BYTE_TO_CHAR: dict[int, str] = {
    b: chr(b) if i < len(_PRINTABLE) else chr(256 + i - len(_PRINTABLE))
    for i, b in enumerate(BYTE_ORDER)
}
CHAR_TO_BYTE: dict[str, int] = {c: b for b, c in BYTE_TO_CHAR.items()}


def as_text(token: bytes) -> str:
    """A token as tokenizer.json and merges.txt write it."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def as_bytes(token: str) -> bytes:
    """The bytes of a token that `as_text` wrote; KeyError for another character."""
    return bytes(CHAR_TO_BYTE[char] for char in token)


def pretokenize(text: str) -> list[str]:
    """Split NFC-normalised `text` into pre-tokens; joined again they are the normalised text.

    Raises ValueError for a lone surrogate.
    """
    text = normalise(text)
    return (_ASCII_PRETOKEN if text.isascii() else _PRETOKEN).findall(text)


def vocabulary(merges: Sequence[Merge]) -> list[bytes]:
    """Regular tokens in id order: 256 bytes, then each merge's result where it first appears."""
    tokens = dict.fromkeys(bytes([b]) for b in BYTE_ORDER)
    for left, right in merges:
        if left not in tokens or right not in tokens:
            raise ValueError(f"merge {left!r} + {right!r} uses a token that no earlier merge makes")
        tokens.setdefault(left + right)
    return list(tokens)


def merge_steps(word: bytes, ranks: Mapping[Merge, int]) -> list[list[bytes]]:
    """All states of one pre-token: from single bytes, one merge a step, lowest rank first.

    `ranks` maps a merge to its place in the list. Slow and readable; `Tokenizer.encode` is the
    fast path with the same last state.
    """
    parts = [bytes([b]) for b in word]
    steps = [parts]
    while len(parts) > 1:
        rank, i = min(
            (ranks.get(pair, len(ranks)), i)
            for i, pair in enumerate(zip(parts, parts[1:], strict=False))
        )
        if rank == len(ranks):
            break
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
        steps.append(parts)
    return steps


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[Merge]:
    """Merges behind a rank table such as `qwen.tiktoken` (token bytes -> rank, 0 to n-1).

    A rank table merges the neighbours whose union has the lowest rank. Run on a token's own bytes
    with only the lower ranks allowed, it stops at the two parts whose merge made the token.
    """
    merges: list[Merge] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            lowest, at = rank, -1
            for i in range(len(parts) - 1):
                r = ranks.get(parts[i] + parts[i + 1], rank)
                if r < lowest:
                    lowest, at = r, i
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2:
            raise ValueError(f"token {token!r} (rank {rank}) is no union of two earlier tokens")
        merges.append((parts[0], parts[1]))
    return merges
