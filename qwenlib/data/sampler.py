"""Pretraining batches as a pure function of (seed, step): resuming needs no data-loader state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from qwenlib.data.packing import IGNORE, PackedBatch
from qwenlib.data.shards import TokenShards


@dataclass(frozen=True)
class SampledBatch(PackedBatch):
    """Rows `first_row`, `first_row` + 1, … of the run."""

    first_row: int

    def rows(self, start: int, stop: int) -> "SampledBatch":
        """Rows [start, stop) of these: a micro-batch."""
        start, stop, _ = slice(start, stop).indices(len(self.input_ids_BT))
        return replace(super().rows(start, stop), first_row=self.first_row + start)

    def describe(self) -> str:
        """Where the rows stand in the run, for messages."""
        return f"rows {self.first_row} to {self.first_row + len(self.input_ids_BT) - 1} of the run"


class MicroBatches(Sequence):
    """`count` micro-batches, each made when it is asked for: only those in use lie in memory."""

    def __init__(self, make: Callable[[int], PackedBatch], count: int):
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        return self._make(range(self._count)[index])


class RowSampler:
    """Shares the numbered rows of a run out to steps and ranks; a subclass knows the rows.

    Step s takes the next world_size * batch_size rows, rank r the r-th batch_size of them: row g of
    the run is the same whatever the batch size, the micro-batches or the number of ranks.
    """

    def __init__(self, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if seq_len < 2 or batch_size < 1:
            raise ValueError(f"seq_len {seq_len} must be at least 2, batch_size {batch_size} 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks (0 to world_size - 1)")
        self.seq_len, self.batch_size = seq_len, batch_size
        self.rank, self.world_size = rank, world_size

    def row(self, g: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Row g of the run (0-based): ids, labels, positions, document ids; int64 [seq_len]."""
        raise NotImplementedError

    def batch(self, step: int) -> SampledBatch:
        """Batch of optimiser step `step` (0-based) for this rank; depends on nothing before it."""
        return self._rows(self._first_row(step), self.batch_size)

    def micro_batches(
        self, step: int, rows: int, device: torch.device | str = "cpu"
    ) -> MicroBatches:
        """`batch(step)` in pieces of `rows` rows (the last may be smaller), made one by one."""
        if rows < 1:
            raise ValueError(f"a micro-batch has {rows} rows, it needs at least 1")
        first, end = self._first_row(step), self.batch_size

        def make(i: int) -> SampledBatch:
            count = min(rows, end - i * rows)
            return self._rows(first + i * rows, count).to(device)

        return MicroBatches(make, -(-end // rows))

    def _first_row(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return (step * self.world_size + self.rank) * self.batch_size

    def _rows(self, first: int, count: int) -> SampledBatch:
        parts = zip(*(self.row(g) for g in range(first, first + count)), strict=True)
        return SampledBatch(*(torch.from_numpy(np.stack(part)) for part in parts), first_row=first)


class PretrainSampler(RowSampler):
    """Rows of `seq_len` tokens cut from the shuffled stream of documents, shuffled once more.

    Each epoch draws a new order of documents, concatenates them, cuts rows and shuffles the rows;
    every token is visited at most once an epoch (the last incomplete row is left out). Row number
    g of the run is the same whatever the batch size or the number of ranks.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(seq_len, batch_size, rank, world_size)
        self.shards, self.seed = shards, seed
        self.rows_per_epoch = shards.num_tokens // seq_len
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"{shards.directory} has {shards.num_tokens} tokens, less than one row of "
                f"{seq_len}; lower seq_len or write more data in chapter 04"
            )
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def epoch(self, step: int) -> float:
        """Passes over the data finished before step `step`."""
        return step * self.batch_size * self.world_size / self.rows_per_epoch

    def _draw_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents in stream order, where each starts in the stream, and the order of rows."""
        rng = np.random.default_rng([self.seed, epoch])
        documents = rng.permutation(len(self.shards))
        lengths = np.diff(self.shards.offsets)[documents]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return documents, starts, rng.permutation(self.rows_per_epoch)

    def row(self, g: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Row g of the run (0-based): ids, labels, positions, document ids; int64 [seq_len]."""
        epoch, index = divmod(g, self.rows_per_epoch)
        documents, starts, row_order = self._order(epoch)
        begin = int(row_order[index]) * self.seq_len
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        ids_T = np.empty(self.seq_len, dtype=np.int64)
        positions_T = np.empty_like(ids_T)
        documents_T = np.empty_like(ids_T)
        filled, at = 0, first
        labels_T = ids_T.copy()
        while filled < self.seq_len:
            document = int(documents[at])
            inside = begin + filled - int(starts[at])
            stop = min(int(starts[at + 1]), begin + self.seq_len) - begin
            source = int(self.shards.offsets[document]) + inside
            ids_T[filled:stop] = self.shards.tokens[source : source + stop - filled]
            labels_T[filled:stop] = ids_T[filled:stop]
            labels_T[filled] = IGNORE  # nothing visible in the row comes before it
            positions_T[filled:stop] = np.arange(stop - filled)
            documents_T[filled:stop] = at - first
            filled, at = stop, at + 1
        return ids_T, labels_T, positions_T, documents_T
