"""Rows of several sources: shares, and one stream however the rows are shared out."""

import tempfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlib.data.mixture_sampler import BLOCK_ROWS, MixtureSampler
from qwenlib.data.sampler import PretrainSampler
from qwenlib.data.shards import write_shards

T = 8
WEIGHTS = {"web": 5, "code": 3.3, "maths": 0.5, "off": 0}
FIELDS = ("input_ids_BT", "labels_BT", "position_ids_BT", "document_ids_BT")


def sources(names=tuple(WEIGHTS), documents=40, vocab_size=10_000):
    """Token t of source number i is 2000 i + t: its source and place can be read from it."""
    made = {}
    for number, name in enumerate(names):
        rng, docs, start = np.random.default_rng(number), [], 2000 * number
        for length in rng.integers(1, 31, size=documents):
            docs.append(list(range(start, start + length)))
            start += int(length)
        with tempfile.TemporaryDirectory() as folder:
            made[name] = write_shards(folder, docs, vocab_size)
            assert made[name].tokens[0] == 2000 * number and len(made[name]) == documents
    return made


def source_of(ids):
    """Brute force: which source a row's tokens are of; all of one."""
    (number,) = set(np.asarray(ids) // 2000)
    return list(WEIGHTS)[number]


def check_one_stream(seed, step, world_size, batch_size, micro_rows):
    """Every split gives the rows of one sampler that makes row by row from the run's start."""
    data = sources()
    alone = MixtureSampler(data, WEIGHTS, T, 1, seed)
    g = step * world_size * batch_size
    for rank in range(world_size):
        sampler = MixtureSampler(data, WEIGHTS, T, batch_size, seed, rank, world_size)
        whole, seen = sampler.batch(step), 0
        for part in sampler.micro_batches(step, micro_rows):
            for b in range(len(part.input_ids_BT)):
                one = alone.batch(g)
                for name in FIELDS:
                    assert torch.equal(getattr(part, name)[b], getattr(one, name)[0])
                    assert torch.equal(getattr(whole, name)[seen], getattr(one, name)[0])
                g, seen = g + 1, seen + 1
        assert seen == batch_size


def check_rows_of_sources():
    """Straight through 2.5 blocks: each source's rows in its own order, none missed or repeated."""
    data, seed = sources(), 3
    mixed, taken = MixtureSampler(data, WEIGHTS, T, 1, seed), Counter()
    alone = {name: PretrainSampler(data[name], T, 1, mixed._samplers[name].seed)
             for name in WEIGHTS if WEIGHTS[name]}  # fmt: skip
    blocks = []
    for g in range(BLOCK_ROWS * 5 // 2):
        ids = mixed.row(g)[0]
        name = source_of(ids)
        assert mixed.place(g) == (name, taken[name]), "the next row of its source"
        assert np.array_equal(ids, alone[name].row(taken[name])[0])
        if g % 400 == 0:
            epochs = mixed.epochs(g)
            assert epochs == {n: taken[n] / alone[n].rows_per_epoch for n in alone}
        taken[name] += 1
        blocks.append(name)
    first, second = blocks[:BLOCK_ROWS], blocks[BLOCK_ROWS : 2 * BLOCK_ROWS]
    assert Counter(first) == Counter(second) == mixed.rows_per_block
    assert first != second, "each block has an order of its own"


def check_shares(weights, quotas):
    """No source is a whole row off, and no other choice of 1,000 rows is nearer to the weights."""
    total = sum(weights.values())
    errors = {n: quotas.get(n, 0) - weight / total * BLOCK_ROWS for n, weight in weights.items()}
    assert sum(quotas.values()) == BLOCK_ROWS
    assert max(map(abs, errors.values())) < 1
    assert max(errors.values()) - min(errors.values()) < 1 + 1e-9, "a row moved would be nearer"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(0, 900), st.integers(1, 4), st.integers(1, 6),
       st.integers(1, 7))  # fmt: skip
def test_one_stream_however_it_is_shared_out(seed, step, world_size, batch_size, micro_rows):
    """Any resumed step, number of ranks, batch and micro-batch size, also across blocks."""
    check_one_stream(seed, step, world_size, batch_size, micro_rows)


def test_one_stream_across_a_block():
    check_one_stream(2, 83, 3, 4, 3)  # rows 996 to 1007


def test_each_source_is_read_in_its_own_order():
    check_rows_of_sources()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=4))
def test_shares_follow_the_weights(numbers):
    weights = dict(zip(WEIGHTS, numbers, strict=False))
    data = {name: DATA[name] for name in weights}
    check_shares(weights, MixtureSampler(data, weights, T, 1, 0).rows_per_block)


DATA = sources()


def test_shares_by_hand():
    sampler = MixtureSampler(DATA, {"web": 1, "code": 1, "maths": 1, "off": 0}, T, 1, 0)
    assert sampler.rows_per_block == {"code": 334, "maths": 333, "web": 333}


def test_a_source_more_changes_no_order():
    """Rows of "web" come in the same order beside "code" and alone, whatever the seed's stream."""
    alone = MixtureSampler({"web": DATA["web"]}, {"web": 1}, T, 1, 4)
    mixed = MixtureSampler(DATA, WEIGHTS, T, 1, 4)
    web = [ids for g in range(200) if source_of(ids := mixed.row(g)[0]) == "web"]
    assert np.array_equal(np.stack(web), np.stack([alone.row(g)[0] for g in range(len(web))]))
    other = MixtureSampler({"web": DATA["web"]}, {"web": 1}, T, 1, 5)
    assert any(not np.array_equal(alone.row(g)[0], other.row(g)[0]) for g in range(9))


def test_the_order_of_the_mapping_does_not_count():
    back = dict(reversed(DATA.items()))
    a, b = MixtureSampler(DATA, WEIGHTS, T, 50, 1), MixtureSampler(back, WEIGHTS, T, 50, 1)
    assert torch.equal(a.batch(3).input_ids_BT, b.batch(3).input_ids_BT)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({**WEIGHTS, "web": -1}, "not negative"),
        ({**WEIGHTS, "web": float("nan")}, "finite"),
        (dict.fromkeys(WEIGHTS, 0), "not all zero"),
        ({**WEIGHTS, "cdoe": 1}, "cdoe: each source needs one weight"),
        ({"web": 1}, "code, maths, off: each source"),
        ({**WEIGHTS, "off": 1e-4}, "of source 'off' is 1.1e-05 of the rows"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        MixtureSampler(DATA, weights, T, 1, 0)


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="different vocabularies: .*'maths': 9000"):
        data = {**DATA, "maths": sources(vocab_size=9000)["maths"]}
        MixtureSampler(data, WEIGHTS, T, 1, 0)
