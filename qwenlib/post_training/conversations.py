"""Conversations to packed, masked batches: the data side of SFT (report §4.1)."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from qwenlib.data.packing import PackedBatch, pack_rows
from qwenlib.tokenizer import Tokenizer
from qwenlib.tokenizer.chat import encode_chat


class ConversationSampler:
    """Batches of packed conversations as a function of the step; a new order each epoch.

    Rows of `seq_len` tokens are filled best-fit and then shuffled, so that a batch does not hold
    rows of one length only. Conversations longer than a row are left out and counted in `dropped`.
    """

    def __init__(
        self, tokenizer: Tokenizer, conversations: Sequence[list[dict]], seq_len: int,
        batch_size: int, seed: int,
    ):  # fmt: skip
        encoded = [encode_chat(tokenizer, messages) for messages in conversations]
        self._encoded = [item for item in encoded if len(item[0]) <= seq_len]
        self.dropped = len(encoded) - len(self._encoded)
        if not self._encoded:
            raise ValueError(f"no conversation fits in {seq_len} tokens; raise seq_len")
        self._pad_id, self._seq_len = tokenizer.pad_token_id, seq_len
        self.batch_size, self._seed = batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._pack)
        self.rows_per_epoch = len(self._epoch(0).input_ids_BT)

    def _pack(self, epoch: int) -> PackedBatch:
        # Best-fit bins depend on the order of equal lengths only; the shuffle makes epochs differ.
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._encoded))
        packed = pack_rows([self._encoded[i] for i in order], self._seq_len, self._pad_id)
        rows = np.random.default_rng([self._seed, epoch, 1]).permutation(len(packed.input_ids_BT))
        return PackedBatch(*(x[torch.from_numpy(rows)] for x in _tensors(packed)))

    def batch(self, step: int) -> PackedBatch:
        """Rows of optimiser step `step`; a batch may span the end of an epoch."""
        first = step * self.batch_size
        parts = []
        for row in range(first, first + self.batch_size):
            epoch, index = divmod(row, self.rows_per_epoch)
            parts.append(_tensors(self._epoch(epoch).rows(index, index + 1)))
        return PackedBatch(*(torch.cat(group) for group in zip(*parts, strict=True)))

    def steps_per_epoch(self) -> int:
        """Optimiser steps that visit each row once."""
        return -(-self.rows_per_epoch // self.batch_size)


def _tensors(batch: PackedBatch) -> tuple[torch.Tensor, ...]:
    return batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, batch.document_ids_BT
