"""Counting pre-tokens: in parallel, in bounded memory, and so that a killed run can go on.

Texts are cut into chunks of a few MB, which worker processes count. When the table of counts is
full, and at regular intervals where a state folder is given, it is written to a file, sorted by
pre-token, and begun anew. Such files are merged like sorted lists, so any number of pre-tokens is
summed in little memory. A file appears whole or not at all and its name tells which chunks it
covers: whenever the process dies, what the files cover has been counted, and nothing else.
"""

import array
import contextlib
import hashlib
import heapq
import itertools
import json
import operator
import os
import re
import struct
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import tokenizers
from filelock import FileLock, Timeout

from qwenlib.processes import WORKER_ENDED, prepare_worker, process_context
from qwenlib.tokenizer.bpe import PRETOKEN_PATTERN, pretokenize

CHUNK_BYTES = 4 << 20  # of text for one task of a worker
PIECE_CHARS = 1 << 12  # longer texts are cut, so that in most pieces all is ASCII
SAVE_CHUNKS = 64  # between two files of the state folder
FILES_MERGED = 16  # at once
_TABLE_BYTES = 1 << 30  # without memory_mb
# A pre-token in the table, and in the table and the merges' index together; measured.
_BYTES_COUNTED, _BYTES_MERGED = 250, 500

# Where a text may be cut: no match of the pattern crosses these places or looks across them, and
# neither a line end nor a space is changed by what follows it in NFC.
_CUT = r"(?<=\n)(?=\S)|(?<=\p{L})(?= )"
_NEXT_CUT, _LAST_CUT = regex.compile(_CUT), regex.compile(f"(?r){_CUT}")


class Pretokens(Counter[bytes]):
    """How often each pre-token occurs; `left_out` occurrences of rare ones are missing."""

    left_out = 0
    left_out_words = 0

    @property
    def left_out_share(self) -> float:
        """Of all occurrences, from 0 to 1."""
        return self.left_out / max(1, self.left_out + self.total())


def count_pretokens(
    texts: Iterable[str], workers: int = 1, *,
    progress: Callable[[int, None], None] | None = None, memory_mb: int | None = None,
    max_words: int | None = None, state_dir: str | Path | None = None,
) -> Pretokens:  # fmt: skip
    """How often each pre-token (UTF-8 bytes) occurs in `texts`.

    workers: processes that count; 1: this one. memory_mb: bound for the table of counts, and for
    the compiled index of the merges later (the interpreter and the workers come on top); None: 1 GB
    for the table, no bound for the result. max_words: how many distinct pre-tokens to return at
    most, the most frequent ones [as memory_mb allows]. state_dir: folder that keeps what has been
    counted; a call with the same texts goes on from there (they are read again, to see that they
    are the same). Without it a full table goes to the system's temporary folder. progress(bytes
    read, None) is called after each chunk. Raises ValueError on a lone surrogate, and on a state
    folder of other texts or settings, which it names.
    """
    for name, value in {"workers": workers, "memory_mb": memory_mb, "max_words": max_words}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1")
    table_bytes = _TABLE_BYTES if memory_mb is None else memory_mb << 20
    if max_words is None and memory_mb is not None:
        max_words = table_bytes // _BYTES_MERGED
    # Distinct short pre-tokens take some forty times their text's bytes.
    chunk_bytes = min(CHUNK_BYTES, max(1 << 14, table_bytes // 64))
    with contextlib.ExitStack() as stack:
        files = None
        if state_dir is not None:
            files = stack.enter_context(_state(Path(state_dir), {
                "pattern": PRETOKEN_PATTERN, "regex": regex.__version__,
                "tokenizers": tokenizers.__version__, "chunk_bytes": chunk_bytes,
                "max_words": max_words,
            }))  # fmt: skip
        chunks, done = _chunks(texts, chunk_bytes), 0
        for digest in files.digests if files else ():
            chunk = next(chunks, None)
            if chunk is None or chunk.digest() != digest:
                raise ValueError(
                    f"{state_dir} belongs to other texts: after {done:,} bytes these "
                    + (f"differ, in text {chunk.first} to {chunk.last}" if chunk else "end")
                    + ": give the same texts, or another folder"
                )
            done += chunk.size
            if progress is not None:
                progress(done, None)
        if files and files.complete:
            if next(chunks, None) is not None:
                raise ValueError(
                    f"{state_dir} belongs to other texts: they end after {done:,} bytes: give the "
                    "same texts, or another folder"
                )
            return _select(files.items, max_words)
        table: dict[bytes, int] = {}
        digests: list[str] = []
        for chunk, part in _counted(chunks, workers):
            for word, n in part.items():
                table[word] = table.get(word, 0) + n
            done += chunk.size
            if state_dir is not None:
                digests.append(chunk.digest())
            if len(table) * _BYTES_COUNTED > table_bytes or len(digests) >= SAVE_CHUNKS:
                if files is None:
                    files = _Files(Path(stack.enter_context(tempfile.TemporaryDirectory())))
                files.add(table, digests)
                table, digests = {}, []
            if progress is not None:
                progress(done, None)
        if files is None:
            return _select(lambda: sorted(table.items()), max_words)
        if table or not files.files:
            files.add(table, digests)
        table = {}
        files.finish()
        return _select(files.items, max_words)


@dataclass(frozen=True)
class _Chunk:
    """Pieces of text in UTF-8; `first`, `last`: the numbers of the texts they are from."""

    pieces: list[bytes]
    size: int
    first: int
    last: int

    def digest(self) -> str:
        hashed = hashlib.blake2b(digest_size=16)
        for piece in self.pieces:
            hashed.update(b"%d " % len(piece))
            hashed.update(piece)
        return hashed.hexdigest()


def _chunks(texts: Iterable[str], chunk_bytes: int) -> Iterator[_Chunk]:
    pieces, size, first, number = [], 0, 1, 0
    if isinstance(texts, str):
        raise TypeError("give several texts, as [text]: a str is one")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TypeError(f"text {number} is no str but {type(text).__name__}")
        for start, piece in _cut(text):
            pieces.append(utf8(piece, f"text {number}", start))
            size += len(pieces[-1])
            if size >= chunk_bytes:
                yield _Chunk(pieces, size, first, number)
                pieces, size, first = [], 0, number
    if pieces:
        yield _Chunk(pieces, size, first, number)


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """(start, piece): together they have the pre-tokens of `text`."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _NEXT_CUT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield start, text[start : cut.start()]
        start = cut.start()
    yield start, text[start:] if start else text


def last_cut(text: str) -> int | None:
    """The last place where `text` can be cut without a change of its pre-tokens."""
    found = _LAST_CUT.search(text)
    return None if found is None else found.start()


def utf8(text: str, name: str, offset: int = 0) -> bytes:
    """UTF-8 of a text; ValueError for a lone surrogate, its place counted from `offset`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {offset + error.start:,} is the lone surrogate "
            f"{text[error.start]!r}, which is no character; read the source with its right "
            "encoding, or repair the text with text.encode('utf-16', 'surrogatepass')"
            ".decode('utf-16', 'replace')"
        ) from None


def _count(pieces: Sequence[bytes]) -> dict[bytes, int]:
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(pretokenize(piece.decode()))
    return {word.encode(): n for word, n in counts.items()}


def _counted(
    chunks: Iterator[_Chunk], workers: int
) -> Iterator[tuple[_Chunk, Mapping[bytes, int]]]:
    """Each chunk with its counts, in the order of the chunks."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, _count(chunk.pieces)
        return
    pool = ProcessPoolExecutor(workers, process_context(), prepare_worker)
    waiting: deque[tuple[_Chunk, Future]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_count, chunk.pieces)))
            if len(waiting) >= 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise RuntimeError(WORKER_ENDED.format(" or a smaller memory_mb")) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _select(items: Callable[[], Iterable[tuple[bytes, int]]], max_words: int | None) -> Pretokens:
    """The most frequent pre-tokens, of equal ones the first; `items` come sorted by pre-token."""
    counts, sizes = Pretokens(), Counter()
    for _, n in items() if max_words is not None else ():
        sizes[n] += 1
    least, room = 0, max_words
    for least in sorted(sizes, reverse=True):
        if sizes[least] > room:
            break
        room -= sizes[least]
    else:
        least = 0
    for word, n in items():
        if n > least or (n == least and room > 0):
            dict.__setitem__(counts, word, n)
            room = room - 1 if n == least else room
        else:
            counts.left_out += n
            counts.left_out_words += 1
    return counts


# --- files of counts


@contextlib.contextmanager
def _state(folder: Path, settings: Mapping[str, Any]) -> Iterator["_Files"]:
    """The counts kept in a state folder, for this process alone."""
    path = folder / "settings.json"
    with locked(folder):
        foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if foreign and not path.exists():
            raise ValueError(f"{folder} holds other files ({foreign[0]}): give an empty folder")
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise _damaged(path) from None
            for name in {**kept, **settings}:
                if kept.get(name) != settings.get(name):
                    raise ValueError(
                        f"{folder} was made with {name}={kept.get(name)!r}, now it is "
                        f"{settings.get(name)!r}: give the same settings (max_words and "
                        "chunk_bytes follow from memory_mb), or another folder"
                    )
        else:
            _write(path, [json.dumps(settings, indent=2).encode() + b"\n"])
        yield _Files(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A state folder for this process alone; it may be locked again inside."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, order=True)
class _File:
    """Counts of the chunks from `first` up to `end`; level n: 16^n tables are in it."""

    first: int
    end: int
    level: int
    path: Path


class _Files:
    """Sorted files of counts in a folder; together they cover the first chunks without a gap."""

    NAME = re.compile(r"counts-(\d+)-(\d+)-(\d+|all)\.bin")

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.complete = folder, [], False
        self.digests: list[str] = []
        found = []
        for path in folder.iterdir():
            if path.name.startswith(".partial-"):
                path.unlink()
            elif match := self.NAME.fullmatch(path.name):
                level = -1 if match[3] == "all" else int(match[3])
                found.append(_File(int(match[1]), int(match[2]), level, path))
        # A merged file and those it was made of: the process died before these were deleted.
        for file in sorted(found, key=lambda file: (file.first, -file.end, file.level)):
            if file.end <= self.covered and self.files:
                file.path.unlink()
                continue
            if file.first != self.covered:
                raise ValueError(f"{folder}: a file before {file.path.name} is lost: delete all")
            self.files.append(file)
            self.complete |= file.level == -1
            self.digests += _digests(file.path)

    @property
    def covered(self) -> int:
        return self.files[-1].end if self.files else 0

    def add(self, table: dict[bytes, int], digests: Sequence[str]) -> None:
        """Keep the counts of the next chunks."""
        end = self.covered + max(1, len(digests))
        items = ((word, table[word]) for word in sorted(table))
        self._write(self.covered, end, 0, items, list(digests))
        while len(self.files) >= FILES_MERGED and self.files[-FILES_MERGED].level == (
            self.files[-1].level
        ):
            self._merge(self.files[-FILES_MERGED:], self.files[-1].level + 1)

    def finish(self) -> None:
        """Merge all counts into one file: everything has been counted."""
        while len(self.files) > FILES_MERGED:
            self._merge(self.files[-FILES_MERGED:], self.files[-FILES_MERGED].level)
        self._merge(list(self.files), -1)
        self.complete = True

    def items(self) -> Iterator[tuple[bytes, int]]:
        """(pre-token, count), sorted."""
        return _merged(self.files)

    def _merge(self, files: Sequence[_File], level: int) -> None:
        digests = [digest for file in files for digest in _digests(file.path)]
        del self.files[-len(files) :]
        self._write(files[0].first, files[-1].end, level, _merged(files), digests)
        for file in files:
            file.path.unlink()

    def _write(
        self, first: int, end: int, level: int, items: Iterable[tuple[bytes, int]],
        digests: list[str],
    ) -> None:  # fmt: skip
        name = f"counts-{first}-{end}-{'all' if level == -1 else level}.bin"
        head = json.dumps(digests).encode() + b"\n"
        _write(self.folder / name, itertools.chain([head], _blocks(items)))
        self.files.append(_File(first, end, level, self.folder / name))


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """The whole file or none, also when the machine stops."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _blocks(items: Iterable[tuple[bytes, int]]) -> Iterator[bytes]:
    """Some thousand pre-tokens each: their number and bytes in all, lengths, counts, the bytes.

    The last block says that it has none.
    """
    items = iter(items)
    while block := list(itertools.islice(items, 4096)):
        joined = b"".join(word for word, _ in block)
        yield struct.pack("=QQ", len(block), len(joined))
        yield array.array("Q", [len(word) for word, _ in block]).tobytes()
        yield array.array("q", [n for _, n in block]).tobytes()
        yield joined
    yield struct.pack("=QQ", 0, 0)


def _digests(path: Path) -> list[str]:
    with path.open("rb") as stream:
        try:
            return json.loads(stream.readline())
        except ValueError:
            raise _damaged(path) from None


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: delete the folder to count again")


def _read(path: Path) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as stream:
        stream.readline()
        while True:
            head = stream.read(16)
            size, total = struct.unpack("=QQ", head) if len(head) == 16 else (1, 0)
            body = stream.read(16 * size + total)
            if len(body) < 16 * size + total:
                raise _damaged(path)
            if size == 0:
                return
            lengths, counts = array.array("Q", body[: 8 * size]), array.array("q")
            counts.frombytes(body[8 * size : 16 * size])
            at = 16 * size
            for length, n in zip(lengths, counts):
                yield body[at : at + length], n
                at += length


def _merged(files: Sequence[_File]) -> Iterator[tuple[bytes, int]]:
    streams = [_read(file.path) for file in files]
    if len(streams) == 1:
        yield from streams[0]
        return
    for word, group in itertools.groupby(heapq.merge(*streams), key=operator.itemgetter(0)):
        yield word, sum(n for _, n in group)
