"""The sampler is a pure function of (seed, step), and an epoch is a partition of the stream."""

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlib.data import sampler as sampler_module
from qwenlib.data.packing import IGNORE
from qwenlib.data.sampler import MicroBatches, PretrainSampler
from qwenlib.data.shards import write_shards
from qwenlib.model import Qwen, QwenConfig
from qwenlib.training.loop import TrainConfig, train
from qwenlib.training.losses import next_token_loss

T = 8
FIELDS = ("input_ids_BT", "labels_BT", "position_ids_BT", "document_ids_BT")


def counted_shards(documents=40):
    """Documents of 1 to 30 tokens; every token has its own id, so that visits can be counted."""
    rng = np.random.default_rng(0)
    docs, start = [], 0
    for length in rng.integers(1, 31, size=documents):
        docs.append(list(range(start, start + length)))
        start += length
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(folder, docs, vocab_size=start)
        assert shards.tokens[0] == shards.offsets[0] == 0  # both are mapped or read from here on
    return shards


@pytest.fixture(scope="module")
def shards():
    return counted_shards()


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


def assert_equal(a, b):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def check_one_stream(seed, step, world_size, batch_size, micro_rows):
    """A step's rows, from all ranks and micro-batches, against one sampler that makes row by row.

    Both are new: what they give at `step` depends on no step before it.
    """
    shards = counted_shards()
    alone = PretrainSampler(shards, T, 1, seed)
    g = step * world_size * batch_size
    for rank in range(world_size):
        sampler = PretrainSampler(shards, T, batch_size, seed, rank, world_size)
        whole, seen = sampler.batch(step), 0
        for part in sampler.micro_batches(step, micro_rows):
            assert part.first_row == g and len(part.input_ids_BT) <= micro_rows
            for b in range(len(part.input_ids_BT)):
                assert_equal(part.rows(b, b + 1), alone.batch(g))
                assert_equal(whole.rows(seen, seen + 1), alone.batch(g))
                assert part.rows(b, b + 1).first_row == g, "a row knows its place in the run"
                g, seen = g + 1, seen + 1
        assert seen == batch_size, "micro-batches hold the rank's rows, no more, no fewer"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(0, 200), st.integers(1, 4), st.integers(1, 6),
       st.integers(1, 7))  # fmt: skip
def test_one_stream_however_it_is_shared_out(seed, step, world_size, batch_size, micro_rows):
    """Any resumed step, number of ranks, batch and micro-batch size."""
    check_one_stream(seed, step, world_size, batch_size, micro_rows)


@pytest.mark.parametrize("setting", [(0, 0, 1, 4, 3), (1, 7, 3, 2, 1), (2, 40, 2, 5, 2)])
def test_one_stream_in_three_settings(setting):
    check_one_stream(*setting)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(0, 5))
def test_each_token_at_most_once_an_epoch(seed, seq_len, epoch):
    shards = counted_shards()
    sampler = PretrainSampler(shards, seq_len, 1, seed)
    rows = sampler.rows_per_epoch
    ids = np.concatenate([sampler.row(epoch * rows + i)[0] for i in range(rows)])
    assert len(ids) == len(np.unique(ids)) == rows * seq_len
    assert shards.num_tokens - len(ids) < seq_len, "only the last incomplete row is left out"


def test_micro_batches_are_made_when_they_are_asked_for():
    made = []
    parts = MicroBatches(lambda i: made.append(i) or i, 5)
    assert len(parts) == 5 and not made
    assert parts[-1] == 4 and parts[1:3] == [1, 2] and made == [4, 1, 2]
    assert list(parts) == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        parts[5]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loop_takes_lazy_micro_batches(shards, workers):
    """Equal to lists of batches bit for bit, and a bad step names its rows."""
    sampler = PretrainSampler(shards, T, 5, seed=3)
    config = QwenConfig(
        vocab_size=shards.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=T,
    )  # fmt: skip
    settings = TrainConfig(max_steps=3, learning_rate=1e-3, workers=workers)

    def run(batches, loss_fn=next_token_loss):
        net = Qwen(config).initialise(0)
        return train(net, batches, loss_fn, settings, show_progress=False).history

    def lists(step):
        batch = sampler.batch(step)
        return [batch.rows(i, i + 2) for i in (0, 2, 4)]

    lazy, whole = run(lambda step: sampler.micro_batches(step, 2)), run(lists)
    assert [row["loss"] for row in lazy] == [row["loss"] for row in whole]
    assert [row["grad_norm"] for row in lazy] == [row["grad_norm"] for row in whole]

    def broken(model, batch):
        loss, count, stats = next_token_loss(model, batch)
        return loss * (float("nan") if batch.first_row == 12 else 1), count, stats

    with pytest.raises(FloatingPointError, match=r"step 3: .*of 3 \(rows 12 to 13 of the run\)"):
        run(lambda step: sampler.micro_batches(step, 2), broken)


def test_stateless(shards):
    straight = PretrainSampler(shards, T, 4, seed=5)
    history = [straight.batch(step) for step in range(60)]
    jumping = PretrainSampler(shards, T, 4, seed=5)
    for step in (59, 3, 3, 40, 0):
        assert_equal(jumping.batch(step), history[step])


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
    with pytest.raises(ValueError, match="a micro-batch has 0 rows"):
        PretrainSampler(shards, 2, 1, 0).micro_batches(0, 0)
    with pytest.raises(ValueError, match="step -1"):
        PretrainSampler(shards, 2, 1, 0).batch(-1)


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
