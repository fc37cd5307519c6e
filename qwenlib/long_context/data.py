"""Rows for context extension: retrieval over the whole length, mixed with ordinary long rows.

The report mixes sequences at the new length with shorter ones and, for the 1M models, adds
synthetic retrieval whose answer lies far back (arXiv 2501.15383); ordinary text seldom needs it.
"""

import random

import torch

from qwenlib.data.packing import PackedBatch, pack_rows
from qwenlib.data.retrieval import passkey_text
from qwenlib.data.sampler import PretrainSampler
from qwenlib.data.shards import TokenShards
from qwenlib.long_context.passkey import filler_for_length
from qwenlib.tokenizer import Tokenizer


class LongContextSampler:
    """`batch(step)`: rows of `seq_len`, a share of them passkey documents of random lengths.

    A pure function of (seed, step), like every sampler here. Raises ValueError for a share outside
    [0, 1].
    """

    def __init__(
        self, tokenizer: Tokenizer, shards: TokenShards, seq_len: int, batch_rows: int,
        long_share: float, seed: int,
    ):  # fmt: skip
        if not 0 <= long_share <= 1:
            raise ValueError(f"long_share must lie in [0, 1], got {long_share}")
        self.tokenizer, self.seq_len, self.batch_rows = tokenizer, seq_len, batch_rows
        self.seed, self.retrieval_rows = seed, round(long_share * batch_rows)
        self._most_filler = filler_for_length(tokenizer, seq_len - 2)
        text_rows = batch_rows - self.retrieval_rows
        self._text = PretrainSampler(shards, seq_len, text_rows, seed) if text_rows else None

    def batch(self, step: int) -> PackedBatch:
        """All rows of optimiser step `step`."""
        parts = [self._text.batch(step)] if self._text else []
        for row in range(self.retrieval_rows):
            parts.append(self._retrieval_row(random.Random(f"{self.seed}/{step}/{row}")))
        fields = ("input_ids_BT", "labels_BT", "position_ids_BT", "document_ids_BT")
        return PackedBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    def _retrieval_row(self, rng: random.Random) -> PackedBatch:
        """One row: documents of one length while they fit, then of half the length, and so on.

        That length is uniform in its logarithm: short documents hold more keys a row to learn from.
        """
        documents, room = [], self.seq_len
        filler = round((self._most_filler + 1) ** rng.random()) - 1
        while True:
            text, key = passkey_text(filler, rng.random(), rng)
            ids = [*self.tokenizer.encode(f"{text} {key}."), self.tokenizer.end_of_text_id]
            if len(ids) > room:
                if filler == 0 or documents and rng.random() < 0.5:
                    break
                filler //= 2
                continue
            documents.append((ids, None))
            room -= len(ids)
        return pack_rows(documents, self.seq_len, self.tokenizer.pad_token_id)
