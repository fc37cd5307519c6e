"""Byte-level BPE: the pre-token pattern, the trainer and a readable encoder (report section 2).

Training counts pre-tokens once and then updates pair counts only in the words that contain the
merged pair, found through an inverted index; a heap with lazy deletion hands out the best pair.
Ties go to the pair with the smallest ids, so the result does not depend on the order of the texts.
"""

import heapq
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import regex

from qwenlib.tokenizer.control import CONTROL_TOKENS

Merge = tuple[bytes, bytes]

# The pattern published with Qwen2: contractions, letters with at most one leading symbol, single
# digits, punctuation runs with their newlines, line ends, white space.
PRETOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRETOKEN = regex.compile(PRETOKEN_PATTERN)

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


def pretokenize(text: str) -> list[str]:
    """Split NFC-normalised `text` into pre-tokens; joined again they are the normalised text."""
    return _PRETOKEN.findall(unicodedata.normalize("NFC", text))


def count_pretokens(texts: Iterable[str]) -> Counter[bytes]:
    """How often each pre-token (UTF-8 bytes) occurs in `texts`."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(pretokenize(text))
    # A lone surrogate is no character and has no UTF-8 form.
    return Counter({word.encode("utf-8", "replace"): n for word, n in counts.items()})


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
    min_count: int = 2,
) -> list[Merge]:
    """Merges of a byte-level BPE whose vocabulary has `vocab_size` rows, control tokens included.

    `progress(done, total)` is called after each merge. Raises ValueError when `vocab_size` leaves
    no room for the 256 bytes and 22 control tokens, or when the text runs out of pairs that occur
    at least `min_count` times.
    """
    n_regular = vocab_size - len(CONTROL_TOKENS)
    if n_regular < 256:
        least = 256 + len(CONTROL_TOKENS)
        raise ValueError(f"vocab_size={vocab_size} is below {least}: 256 bytes, 22 control tokens")
    return merges_from_counts(count_pretokens(texts), n_regular, progress, min_count)


def merges_from_counts(
    counts: Mapping[bytes, int],
    n_regular: int,
    progress: Callable[[int, int], None] | None = None,
    min_count: int = 2,
) -> list[Merge]:
    """Merges that grow the 256 bytes to `n_regular` tokens on counted pre-tokens."""
    tokens: list[bytes] = [bytes([b]) for b in BYTE_ORDER]
    token_id = {token: i for i, token in enumerate(tokens)}
    # A word is a string with one character a token, chr(id): `str.replace` then merges a pair
    # everywhere at C speed, from the left, and pairs order like their ids.
    letter = {b: chr(i) for i, b in enumerate(BYTE_ORDER)}
    words = ["".join(letter[b] for b in word) for word in counts]
    frequency = list(counts.values())

    pair_count: dict[str, int] = defaultdict(int)
    words_with: dict[str, set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in _pairs(word):
            pair_count[pair] += frequency[w]
            words_with[pair].add(w)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    merges: list[Merge] = []
    merged: set[str] = set()
    total = n_regular - len(tokens)
    while len(tokens) < n_regular:
        while heap and -heap[0][0] != pair_count.get(heap[0][1], 0):
            heapq.heappop(heap)  # the count changed after this entry was pushed
        if not heap or -heap[0][0] < min_count:
            raise ValueError(
                f"the text gives only {len(tokens)} tokens, {n_regular} were asked for: "
                "use more text or a smaller vocab_size"
            )
        pair = heapq.heappop(heap)[1]
        left, right = (tokens[ord(char)] for char in pair)
        # Two routes can spell one token ("ab"+"c", "a"+"bc"): the token exists once, both merges
        # count, and a pair that comes back through the second route is not listed again.
        new_id = token_id.setdefault(left + right, len(tokens))
        if new_id == len(tokens):
            tokens.append(left + right)
        if pair not in merged:
            merged.add(pair)
            merges.append((left, right))

        new = chr(new_id)
        change: dict[str, int] = defaultdict(int)
        for w in words_with.pop(pair):
            word = words[w]
            after = word.replace(pair, new)
            if len(after) == len(word):
                continue  # an earlier merge took the pair out of this word
            n = frequency[w]
            for old in _pairs(word):
                change[old] -= n
            for fresh in _pairs(after):
                change[fresh] += n
                if new in fresh:
                    words_with[fresh].add(w)
            words[w] = after
        for touched, n in change.items():
            if n:
                pair_count[touched] += n
                heapq.heappush(heap, (-pair_count[touched], touched))
        if progress is not None:
            progress(len(tokens) - 256, total)
    return merges


def _pairs(word: str) -> list[str]:
    """Neighbouring characters, overlaps included: "aaa" has the pair "aa" twice."""
    return [word[i : i + 2] for i in range(len(word) - 1)]


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
