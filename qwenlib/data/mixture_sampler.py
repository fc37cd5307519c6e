"""Pretraining batches from several sources in given shares, still a pure function of the step."""

import math
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256

import numpy as np

from qwenlib.data.sampler import PretrainSampler, RowSampler
from qwenlib.data.shards import TokenShards

BLOCK_ROWS = 1000  # rows that hold each source's share exactly


class MixtureSampler(RowSampler):
    """Rows of `seq_len` tokens, each from one source; the shares of rows follow the weights.

    Every 1,000 rows of the run hold the same number of rows of a source, its weight (normalised to
    sum 1) in thousandths, in an order drawn from (seed, block): so the row of a source that row g
    of the run shows follows from g alone. A source reads its documents in the order of a
    `PretrainSampler` whose seed comes from (seed, name): another source or other weights do not
    change that order.

    Raises ValueError for no positive weight, weights that are negative or not finite, a weight
    without a source or a source without a weight, a weight above 0 but too small for one row of
    1,000, and sources of different vocabularies.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        weights: Mapping[str, float],
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(seq_len, batch_size, rank, world_size)
        if odd := set(weights) ^ set(sources):
            raise ValueError(
                f"{', '.join(sorted(odd))}: each source needs one weight (0 leaves it out), "
                f"each weight a source; sources are {', '.join(sorted(sources))}"
            )
        sizes = {name: shards.vocab_size for name, shards in sources.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"sources of different vocabularies: {sizes}; encode them again alike")
        self.seed, self.rows_per_block = seed, _quotas(weights)
        self._names = list(self.rows_per_block)
        self._samplers = {
            name: PretrainSampler(sources[name], seq_len, 1, _seed_of(seed, name))
            for name in self._names
        }
        self._block = lru_cache(maxsize=2)(self._draw_block)

    def place(self, g: int) -> tuple[str, int]:
        """Source of row g of the run, and the number of that row among the source's (0-based)."""
        block, index = divmod(g, BLOCK_ROWS)
        sources, ranks = self._block(block)
        name = self._names[sources[index]]
        return name, block * self.rows_per_block[name] + int(ranks[index])

    def row(self, g: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Row g of the run (0-based): ids, labels, positions, document ids; int64 [seq_len]."""
        name, index = self.place(g)
        return self._samplers[name].row(index)

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source finished before step `step`; above about 4 they stop paying."""
        blocks, index = divmod(step * self.world_size * self.batch_size, BLOCK_ROWS)
        before = np.bincount(self._block(blocks)[0][:index], minlength=len(self._names))
        return {
            name: (blocks * self.rows_per_block[name] + int(n)) / sampler.rows_per_epoch
            for (name, sampler), n in zip(self._samplers.items(), before, strict=True)
        }

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a block: index of its source, and how many of that source precede it."""
        counts = list(self.rows_per_block.values())
        rng = np.random.default_rng([self.seed, block])
        sources = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        ranks = np.empty_like(sources)
        ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
        return sources, ranks


def _quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Rows of a block for each source of positive weight, by largest remainder, names sorted."""
    bad = {name: w for name, w in weights.items() if not (math.isfinite(w) and w >= 0)}
    norm = math.fsum(w for name, w in weights.items() if name not in bad)
    if bad or norm <= 0:
        raise ValueError(
            f"weights must be finite, not negative and not all zero, got {dict(weights)}"
        )
    exact = {name: weights[name] / norm * BLOCK_ROWS for name in sorted(weights) if weights[name]}
    quotas = {name: math.floor(share) for name, share in exact.items()}
    left = BLOCK_ROWS - sum(quotas.values())
    for name in sorted(exact, key=lambda name: (quotas[name] - exact[name], name))[:left]:
        quotas[name] += 1
    for name, quota in quotas.items():
        if quota == 0:
            raise ValueError(
                f"weight {weights[name]:g} of source {name!r} is {exact[name] / BLOCK_ROWS:.2g} of "
                f"the rows, less than one in {BLOCK_ROWS}: raise it, or join small sources"
            )
    return quotas


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
