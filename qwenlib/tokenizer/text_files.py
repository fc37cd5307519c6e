"""Texts out of .txt, .jsonl, .jsonl.gz and .parquet files, a little at a time."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from qwenlib.tokenizer.pretokens import last_cut, utf8

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_BLOCK = 1 << 20


def check_files(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError or ValueError for the first path that `read_texts` would not take."""
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the files in it")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file")
        if not path.name.lower().endswith(KINDS):
            raise ValueError(f"{path}: the name must end with {', '.join(KINDS)}")


def read_texts(paths: Sequence[Path], column: str = "text") -> Iterator[str]:
    """The texts of some files; `column` of .jsonl and .parquet holds them.

    A .txt file is one text. It comes in pieces, cut where that changes no pre-token: at line ends,
    or in a megabyte without one between words. Raises ValueError, with the file and the place, on
    bad UTF-8, bad JSON or Parquet, a missing column, a value that is no string.
    """
    check_files(paths)
    for path in paths:
        if path.suffix.lower() == ".txt":
            yield from _plain(path)
        elif path.suffix.lower() == ".parquet":
            yield from _parquet(path, column)
        else:
            yield from _json_lines(path, column)


def _plain(path: Path) -> Iterator[str]:
    decoder, done, held = codecs.getincrementaldecoder("utf-8")(), 0, []
    with path.open("rb") as stream:
        while True:
            block = stream.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: byte {done - pending + error.start:,} is no UTF-8 ({error.reason}): "
                    "convert the file, for instance with iconv -t utf-8"
                ) from None
            done += len(block)
            if not block:
                break
            cut = last_cut(text)
            if cut is None:
                held.append(text)
            else:
                yield "".join([*held, text[:cut]])
                held = [text[cut:]]
    if rest := "".join(held):
        yield rest


def _json_lines(path: Path, column: str) -> Iterator[str]:
    packed = path.suffix.lower() == ".gz"
    with gzip.open(path, "rb") if packed else path.open("rb") as stream:
        for number, line in enumerate(_lines(path, stream), 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a {type(row).__name__}, no object with {column!r}")
            yield _value(row, column, place)


def _lines(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is damaged: {error}") from None


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in (names := file.schema_arrow.names):
                raise ValueError(_missing(column, names, str(path)))
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _value({column: value}, column, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as Parquet: {error}") from None


def _value(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise ValueError(_missing(column, list(row), place))
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{place}: {column!r} is no string but {type(text).__name__}")
    if not text.isascii():
        utf8(text, place)  # JSON can spell half a surrogate pair
    return text


def _missing(column: str, names: Sequence[str], place: str) -> str:
    return f"{place}: no column {column!r}, there is {', '.join(names) or 'none'}: give --column"
