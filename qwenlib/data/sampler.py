"""Pretraining batches as a pure function of (seed, step): resuming needs no data-loader state."""

from functools import lru_cache

import numpy as np
import torch

from qwenlib.data.packing import IGNORE, PackedBatch
from qwenlib.data.shards import TokenShards


class PretrainSampler:
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
        if seq_len < 2 or batch_size < 1:
            raise ValueError(f"seq_len {seq_len} must be at least 2, batch_size {batch_size} 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks (0 to world_size - 1)")
        self.shards, self.seq_len, self.batch_size, self.seed = shards, seq_len, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.rows_per_epoch = shards.num_tokens // seq_len
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"{shards.directory} has {shards.num_tokens} tokens, less than one row of "
                f"{seq_len}; lower seq_len or write more data in chapter 04"
            )
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def batch(self, step: int) -> PackedBatch:
        """Batch of optimiser step `step` (0-based) for this rank; depends on nothing before it."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        first = (step * self.world_size + self.rank) * self.batch_size
        rows = [self._row(first + b) for b in range(self.batch_size)]
        return PackedBatch(*(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)))

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

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        epoch, index = divmod(row, self.rows_per_epoch)
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
