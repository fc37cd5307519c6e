"""The sampler is a pure function of (seed, step), and an epoch is a partition of the stream."""

import numpy as np
import pytest
import torch

from qwenlib.data import sampler as sampler_module
from qwenlib.data.packing import IGNORE
from qwenlib.data.sampler import PretrainSampler
from qwenlib.data.shards import write_shards

T = 8


@pytest.fixture
def shards(tmp_path):
    """Documents of 1 to 30 tokens; every token has its own id, so that visits can be counted."""
    rng = np.random.default_rng(0)
    docs, start = [], 0
    for length in rng.integers(1, 31, size=40):
        docs.append(list(range(start, start + length)))
        start += length
    return write_shards(tmp_path / "tokens", docs, vocab_size=start)


def check_rows(sampler_class, shards):
    """Contents of every row of two epochs against the documents they were cut from."""
    sampler = sampler_class(shards, T, 4, seed=1)
    document_of = np.repeat(np.arange(len(shards)), np.diff(shards.offsets))
    rows = sampler.rows_per_epoch
    seen: list[int] = []
    for step in range(-(-2 * rows // 4)):
        batch = sampler.batch(step)
        for b in range(4):
            if step * 4 + b >= 2 * rows:
                continue
            ids = batch.input_ids_BT[b].tolist()
            real, position = document_of[ids], -1
            ours = batch.document_ids_BT[b].tolist()
            for t in range(T):
                first = t == 0 or real[t] != real[t - 1]
                if t:
                    assert (ours[t] != ours[t - 1]) == first, "document ids change with documents"
                    assert first or ids[t] == ids[t - 1] + 1, "documents are contiguous"
                expected = 0 if first else position + 1
                position = int(batch.position_ids_BT[b, t])
                assert position == expected, "positions restart with the document"
                label = int(batch.labels_BT[b, t])
                assert label == (IGNORE if first else ids[t]), "first label of a document"
            seen += ids
    for epoch in (seen[: rows * T], seen[rows * T :]):
        assert len(epoch) == len(set(epoch)) == rows * T, "each token at most once an epoch"
    assert shards.num_tokens - rows * T < T, "only the last incomplete row is left out"
    assert seen[: rows * T] != seen[rows * T :], "another order in the next epoch"


def test_rows_are_cut_from_the_document_stream(shards):
    check_rows(PretrainSampler, shards)


def test_stateless(shards):
    straight = PretrainSampler(shards, T, 4, seed=5)
    history = [straight.batch(step) for step in range(60)]
    jumping = PretrainSampler(shards, T, 4, seed=5)
    for step in (59, 3, 3, 40, 0):
        for a, b in zip(vars(jumping.batch(step)).values(), vars(history[step]).values(),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)


def test_seed_changes_the_order(shards):
    a, b = (PretrainSampler(shards, T, 4, seed=s).batch(0).input_ids_BT for s in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_batch_split_gives_the_same_stream(shards, batch_size):
    whole = PretrainSampler(shards, T, 24, seed=2)
    split = PretrainSampler(shards, T, batch_size, seed=2)
    expected = torch.cat([whole.batch(s).input_ids_BT for s in range(4)])
    got = torch.cat([split.batch(s).input_ids_BT for s in range(96 // batch_size)])
    assert torch.equal(got, expected)


def test_ranks_share_one_stream(shards):
    whole = PretrainSampler(shards, T, 8, seed=2).batch(7).input_ids_BT
    ranks = [PretrainSampler(shards, T, 4, 2, rank=r, world_size=2) for r in range(2)]
    assert torch.equal(torch.cat([r.batch(7).input_ids_BT for r in ranks]), whole)
    assert ranks[0].epoch(10) == pytest.approx(80 / ranks[0].rows_per_epoch)


def test_too_little_data_is_named(tmp_path):
    shards = write_shards(tmp_path, [[1, 2, 3]], 10)
    with pytest.raises(ValueError, match="3 tokens, less than one row of 8"):
        PretrainSampler(shards, T, 1, 0)
    with pytest.raises(ValueError, match="rank 2"):
        PretrainSampler(shards, 2, 1, 0, rank=2, world_size=2)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("labels_T[filled] = IGNORE", "pass  #"),
        ("documents_T[filled:stop] = at - first", "documents_T[filled:stop] = 0"),
        ("np.arange(stop - filled)", "np.arange(filled, stop)"),
        ("int(row_order[index]) * self.seq_len", "int(row_order[index]) * (self.seq_len - 1)"),
        ("default_rng([self.seed, epoch])", "default_rng([self.seed])"),
    ],
)
def test_a_broken_line_is_noticed(line, broken, mutated, shards):
    module = mutated(sampler_module, line, broken)
    with pytest.raises(AssertionError):
        check_rows(module.PretrainSampler, shards)
