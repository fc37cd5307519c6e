"""Token shards: documents as one flat memory-mapped array of token ids plus their offsets."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np

_TOKENS, _OFFSETS, _META = "tokens.bin", "offsets.npy", "meta.json"


def write_shards(
    directory: str | Path, token_docs: Iterable[Sequence[int]], vocab_size: int
) -> "TokenShards":
    """Write documents of token ids; 2 bytes a token up to 65,536 ids, else 4.

    Raises ValueError for an empty document or an id outside [0, vocab_size). `meta.json` is
    written last: a folder without it is an interrupted write and is refused by `TokenShards`.
    """
    directory = Path(directory)
    vocab_size = int(vocab_size)  # a NumPy integer does not go into meta.json
    directory.mkdir(parents=True, exist_ok=True)
    meta_path = directory / _META
    meta_path.unlink(missing_ok=True)
    dtype = np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
    offsets, digest = [0], sha256()
    with open(directory / _TOKENS, "wb") as file:
        for index, ids in enumerate(token_docs):
            array = np.asarray(ids, dtype=np.int64)
            if array.ndim != 1 or array.size == 0:
                raise ValueError(f"document {index} has no tokens; drop empty documents first")
            low, high = int(array.min()), int(array.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"document {index} has token id {low if low < 0 else high}, outside a "
                    f"vocabulary of {vocab_size}; was it encoded with another tokenizer?"
                )
            data = array.astype(dtype).tobytes()
            digest.update(data)
            file.write(data)
            offsets.append(offsets[-1] + array.size)
    if len(offsets) == 1:
        raise ValueError(f"no documents to write to {directory}")
    np.save(directory / _OFFSETS, np.asarray(offsets, dtype=np.int64))
    meta = {
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "sha256": digest.hexdigest(),
    }
    meta_path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return TokenShards(directory)


class TokenShards:
    """Read side of `write_shards`; `len` is the number of documents."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        meta_path = self.directory / _META
        if not meta_path.is_file():
            raise FileNotFoundError(
                f"{meta_path} is missing: not a folder of token shards, or its writing was "
                "interrupted; run chapter 04_pretraining_data again"
            )
        self.meta = json.loads(meta_path.read_text(encoding="utf-8"))
        self.vocab_size: int = self.meta["vocab_size"]
        expected = self.meta["tokens"] * np.dtype(self.meta["dtype"]).itemsize
        actual = (self.directory / _TOKENS).stat().st_size
        if actual != expected:
            raise ValueError(
                f"{self.directory / _TOKENS} has {actual} bytes, its meta.json says {expected}; "
                "the copy is damaged, run chapter 04_pretraining_data again"
            )

    @cached_property
    def tokens(self) -> np.memmap:
        """All tokens, 1-D, read-only, memory-mapped (one process does not hold them in memory)."""
        path = self.directory / _TOKENS
        return np.memmap(path, dtype=np.dtype(self.meta["dtype"]).newbyteorder("<"), mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """Document i is tokens[offsets[i]:offsets[i + 1]]; shape [documents + 1]."""
        return np.load(self.directory / _OFFSETS)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """Token ids of document `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.directory}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def shards_for(tokenizer, data: str | Path, name: str, work: str | Path) -> TokenShards:
    """Chapter 04's documents `name` (train or heldout) as tokens of this tokenizer.

    data: chapter 04's folder. Its own tokens where they are this tokenizer's; else its text,
    encoded again into the folder `work`, each document ending with <|endoftext|>.
    """
    import pyarrow.parquet

    shards = TokenShards(Path(data) / "tokens" / name)
    text = pyarrow.parquet.ParquetFile(Path(data) / "text" / f"{name}.parquet")

    def documents() -> Iterable[list[int]]:
        for rows in text.iter_batches(1024, columns=["text"]):
            for ids in tokenizer.encode_batch(rows["text"].to_pylist()):
                yield [*ids, tokenizer.end_of_text_id]

    some = enumerate(islice(documents(), 100))
    if all(ids == shards.document(i).tolist() for i, ids in some):
        return shards
    return write_shards(work, documents(), tokenizer.vocab_size)
