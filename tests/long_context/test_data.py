"""Rows for context extension: shares, purity, and documents that answer themselves."""

import random
import re
import tempfile

import pytest
import torch

from qwenlib.data.retrieval import passkey_text
from qwenlib.data.shards import write_shards
from qwenlib.long_context.data import LongContextSampler
from qwenlib.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join(passkey_text(10, 0.5, random.Random(i))) for i in range(20)]
    return Tokenizer.from_merges(train_bpe(texts, 340))


@pytest.fixture(scope="module")
def sampler(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(0)
        documents = [[rng.randrange(250) for _ in range(rng.randint(5, 90))] for _ in range(80)]
        shards = write_shards(folder, documents, tokenizer.vocab_size)

        def make(share=0.75, seed=0):
            return LongContextSampler(tokenizer, shards, 256, 4, share, seed)

        yield make


def test_batch_is_a_function_of_seed_and_step(sampler):
    one, two = sampler(), sampler()
    for step in (5, 0, 5):
        a, b = one.batch(step), two.batch(step)
        assert torch.equal(a.input_ids_BT, b.input_ids_BT)
        assert torch.equal(a.labels_BT, b.labels_BT)
    assert not torch.equal(one.batch(0).input_ids_BT, one.batch(1).input_ids_BT)
    assert not torch.equal(one.batch(0).input_ids_BT, sampler(seed=1).batch(0).input_ids_BT)


@pytest.mark.parametrize("share,rows", [(0.0, 0), (0.75, 3), (1.0, 4)])
def test_share_of_retrieval_rows(sampler, tokenizer, share, rows):
    lengths = []
    for step in range(6):
        batch = sampler(share).batch(step)
        assert batch.input_ids_BT.shape == (4, 256)
        for row in range(4 - rows, 4):
            documents = batch.document_ids_BT[row]
            for index in range(int(documents.max()) + 1):
                ids = batch.input_ids_BT[row][documents == index].tolist()
                lengths.append(len(ids))
                assert ids[-1] == tokenizer.end_of_text_id
                keys = re.findall(r"\d+", tokenizer.decode(ids[:-1]))
                assert len(keys) == 3 and len(set(keys)) == 1, "a whole passkey document"
    if rows:
        assert max(lengths) > 150 and min(lengths) < 100, "lengths of all kinds"
        assert sum(length < 100 for length in lengths) > 0.75 * len(lengths), "mostly short ones"
    texts = [tokenizer.decode(ids.tolist()) for ids in batch.input_ids_BT[: 4 - rows]]
    assert not any("pass key" in text for text in texts)


def test_bad_share_is_named(sampler):
    with pytest.raises(ValueError, match="long_share"):
        sampler(1.5)
