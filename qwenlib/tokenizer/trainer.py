"""Training byte-level BPE: pre-tokens are counted once, then the most frequent pair is merged.

A merge changes pair counts only in the words that hold the pair, found through an inverted index; a
heap with lazy deletion hands out the best pair. Ties go to the pair with the smallest ids, so the
result does not depend on the order of the texts. `trainer.c` does the same, compiled.

No token can be made by two different pairs, and a merged pair never comes back: as long as no token
crosses the ends of a string, what the merges so far have made of it depends on the string alone.
"""

import array
import contextlib
import ctypes
import functools
import hashlib
import heapq
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from qwenlib.c_build import compiled
from qwenlib.tokenizer.bpe import BYTE_ORDER, Merge
from qwenlib.tokenizer.control import CONTROL_TOKENS
from qwenlib.tokenizer.pretokens import Pretokens, count_pretokens, locked

__all__ = [
    "Pretokens",
    "Progress",
    "count_pretokens",
    "merges_from_counts",
    "readable_merges",
    "train_bpe",
]

_SOURCE = Path(__file__).with_suffix(".c")


class Progress(Protocol):
    """Called as training goes on."""

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """phase "read": bytes of text, total unknown (None); "merge": merges."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, progress: Progress | None = None, min_count: int = 2,
    *, workers: int = 1, memory_mb: int | None = None, max_words: int | None = None,
    state_dir: str | Path | None = None,
) -> list[Merge]:  # fmt: skip
    """Merges of a byte-level BPE whose vocabulary has `vocab_size` rows, control tokens included.

    workers, memory_mb, max_words: see `count_pretokens`; a warning tells what share of the text
    was left out. state_dir: folder from which a killed run goes on when it is called again with the
    same texts; a larger `vocab_size` goes on from a smaller one. Raises ValueError when
    `vocab_size` leaves no room for the 256 bytes and 22 control tokens, when the text runs out of
    pairs that occur at least `min_count` times, or when `state_dir` is of other texts or settings.
    """
    n_regular = vocab_size - len(CONTROL_TOKENS)
    if n_regular < 256:
        least = 256 + len(CONTROL_TOKENS)
        raise ValueError(f"vocab_size={vocab_size} is below {least}: 256 bytes, 22 control tokens")
    _check_min_count(min_count)
    reading, merging = (progress and functools.partial(progress, p) for p in ("read", "merge"))
    folder = None if state_dir is None else Path(state_dir)
    with contextlib.nullcontext() if folder is None else locked(folder):
        counts = count_pretokens(
            texts, workers, progress=reading, memory_mb=memory_mb, max_words=max_words,
            state_dir=folder,
        )  # fmt: skip
        if counts.left_out:
            warnings.warn(
                f"{counts.left_out_words:,} rare pre-tokens, {counts.left_out_share:.2%} of all "
                f"occurrences, are left out of the merges: only {len(counts):,} distinct ones fit",
                stacklevel=2,
            )
        log = None if folder is None else folder / "merges.txt"
        return merges_from_counts(counts, n_regular, merging, min_count, log=log)


def merges_from_counts(
    counts: Mapping[bytes, int], n_regular: int,
    progress: Callable[[int, int], None] | None = None, min_count: int = 2,
    *, log: Path | None = None,
) -> list[Merge]:  # fmt: skip
    """`readable_merges` of the same arguments, made by compiled code where there is a compiler.

    log: a file that receives the merges one by one; those it holds already are taken from it.
    """
    _check_min_count(min_count)
    if counts and min(counts.values()) < 1:
        raise ValueError("counts holds a pre-token that occurs less than once")
    steps = MergeLog(log, counts) if log is not None else None
    try:
        # 64-bit counts; a word of n bytes has n - 1 pairs.
        fits = sum(len(word) * n for word, n in counts.items()) < 2**63 and len(counts) < 2**32 - 1
        library = _library() if fits else None
        if library is None:
            return readable_merges(counts, n_regular, progress, min_count, steps)
        return _compiled_merges(library, counts, n_regular, progress, min_count, steps)
    finally:
        if steps is not None:
            steps.close()


def readable_merges(
    counts: Mapping[bytes, int], n_regular: int,
    progress: Callable[[int, int], None] | None = None, min_count: int = 2,
    steps: list[tuple[int, int]] | None = None,
) -> list[Merge]:  # fmt: skip
    """Merges that grow the 256 bytes to `n_regular` tokens on counted pre-tokens.

    `progress(done, total)` is called after each merge. steps: pairs of ids merged by an earlier
    call, which are merged again without a search; new ones are appended. Raises ValueError when no
    pair is left that occurs at least `min_count` times.
    """
    tokens: list[bytes] = [bytes([b]) for b in BYTE_ORDER]
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
    steps = [] if steps is None else steps
    while len(tokens) < n_regular:
        if len(merges) < len(steps):
            pair = "".join(map(chr, steps[len(merges)]))
        else:
            while heap and -heap[0][0] != pair_count[heap[0][1]]:
                heapq.heappop(heap)  # the count changed after this entry was pushed
            pair = heap[0][1] if heap else ""
        if pair_count[pair] < min_count:
            raise _too_little_text(len(tokens), n_regular)
        left, right = (tokens[ord(char)] for char in pair)
        new = chr(len(tokens))
        tokens.append(left + right)
        merges.append((left, right))
        if len(merges) > len(steps):
            steps.append((ord(pair[0]), ord(pair[1])))

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
            progress(len(merges), n_regular - 256)
    return merges


def _pairs(word: str) -> list[str]:
    """Neighbouring characters, overlaps included: "aaa" has the pair "aa" twice."""
    return [word[i : i + 2] for i in range(len(word) - 1)]


def _check_min_count(min_count: int) -> None:
    if min_count < 1:
        raise ValueError(f"min_count={min_count}: a pair that does not occur cannot be merged")


def _too_little_text(tokens: int, n_regular: int) -> ValueError:
    return ValueError(
        f"the text gives only {tokens} regular tokens, {n_regular} were asked for: "
        "use more text or a smaller vocab_size"
    )


def _library() -> ctypes.CDLL | None:
    """`trainer.c`; None without a C compiler."""
    library = compiled(_SOURCE, "Python's slower way")
    if library is not None:
        i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
        for name, result, arguments in (
            ("bpe_new", pointer, [i64, ctypes.c_char_p, pointer, pointer]),
            ("bpe_best", i64, [pointer, pointer]),
            ("bpe_count", i64, [pointer, i32, i32]),
            ("bpe_merge", ctypes.c_int, [pointer, i32, i32, i32]),
            ("bpe_free", None, [pointer]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    return library


def _compiled_merges(
    library: ctypes.CDLL, counts: Mapping[bytes, int], n_regular: int,
    progress: Callable[[int, int], None] | None, min_count: int,
    steps: list[tuple[int, int]] | None,
) -> list[Merge]:  # fmt: skip
    """`readable_merges`; a call of compiled code is one merge, so that Ctrl-C comes through."""
    tokens: list[bytes] = [bytes([b]) for b in BYTE_ORDER]
    ids = b"".join(counts).translate(bytes(map(BYTE_ORDER.index, range(256))))
    lengths, frequency = array.array("q", map(len, counts)), array.array("q", counts.values())
    trainer = library.bpe_new(
        len(counts), ids, lengths.buffer_info()[0], frequency.buffer_info()[0]
    )
    del ids, lengths, frequency
    if trainer is None:
        raise _no_memory(counts)
    try:
        merges: list[Merge] = []
        steps = [] if steps is None else steps
        best = (ctypes.c_int32 * 2)()
        while len(tokens) < n_regular:
            if len(merges) < len(steps):
                pair = steps[len(merges)]
                count = library.bpe_count(trainer, *pair)
            else:
                count = library.bpe_best(trainer, best)
                pair = best[0], best[1]
            if count < min_count:
                raise _too_little_text(len(tokens), n_regular)
            if library.bpe_merge(trainer, *pair, len(tokens)):
                raise _no_memory(counts)
            left, right = (tokens[i] for i in pair)
            tokens.append(left + right)
            merges.append((left, right))
            if len(merges) > len(steps):
                steps.append(pair)
            if progress is not None:
                progress(len(merges), n_regular - 256)
        return merges
    finally:
        library.bpe_free(trainer)


def _no_memory(counts: Mapping[bytes, int]) -> MemoryError:
    return MemoryError(
        f"the merges of {len(counts):,} distinct pre-tokens do not fit: give a smaller memory_mb "
        "or max_words"
    )


class MergeLog(list[tuple[int, int]]):
    """Merged pairs of ids in a file, each written when it is appended; a torn last line is cut.

    Raises ValueError for a file that belongs to other counts or is damaged.
    """

    def __init__(self, path: Path, counts: Mapping[bytes, int]) -> None:
        super().__init__()
        digest = hashlib.blake2b(digest_size=16)
        for word in sorted(counts):
            digest.update(b"%d %d " % (len(word), counts[word]) + word)
        head = (
            f"merges of {len(counts)} pre-tokens that occur {sum(counts.values())} times "
            f"({digest.hexdigest()})\n"
        )
        self._file = path.open("a+b", buffering=0)
        try:
            self._read(path, head.encode())
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path, head: bytes) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        first, *lines = content[:whole].splitlines(keepends=True) or [content]
        if not (first == head if whole else head.startswith(content)):
            raise ValueError(
                f"{path} holds {first.decode(errors='replace').strip()}, these are the "
                f"{head.decode().strip()}: give another folder, or delete this file"
            )
        self._file.truncate(whole)
        if whole == 0:
            self._file.write(head)
        for number, line in enumerate(lines):
            try:
                left, right = map(int, line.split())
            except ValueError:
                left = right = -1
            if not (0 <= left < 256 + number and 0 <= right < 256 + number):
                raise ValueError(
                    f"{path}, line {number + 2}: no pair of earlier tokens: delete this file to "
                    "make the merges again"
                )
            super().append((left, right))

    def append(self, step: tuple[int, int]) -> None:
        """To the file, then to the list."""
        self._file.write(b"%d %d\n" % step)
        super().append(step)

    def close(self) -> None:
        """No more merges can be appended."""
        self._file.close()
