"""Packing: bins against a naive oracle; labels, positions and document ids by definition."""

import random

import pytest
import torch

from qwenlib.data import packing
from qwenlib.data.packing import IGNORE, NO_DOCUMENT, pack_best_fit, pack_rows


def naive_best_fit(lengths, capacity):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [
            (capacity - sum(lengths[i] for i in members), number)
            for number, members in enumerate(bins)
        ]
        fitting = [pair for pair in rooms if pair[0] >= lengths[index]]
        if fitting:
            bins[min(fitting)[1]].append(index)
        else:
            bins.append([index])
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_bins_equal_the_naive_best_fit(seed):
    rng = random.Random(seed)
    capacity = rng.choice([7, 32, 100])
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 80))]
    bins = pack_best_fit(lengths, capacity)
    assert bins == naive_best_fit(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in members) for members in bins) <= capacity


def test_bins_by_hand():
    # 5+3 and 4+4 fill rows of 8; first-fit in the given order would need three rows.
    assert pack_best_fit([4, 3, 5, 4], 8) == [[2, 1], [0, 3]]


@pytest.mark.parametrize("lengths", [[3, 9], [0, 2]])
def test_a_document_that_does_not_fit_is_named(lengths):
    bad = 1 if lengths[1] == 9 else 0
    with pytest.raises(ValueError, match=f"document {bad} has"):
        pack_best_fit(lengths, 8)


def check_rows(docs, capacity, pad_id):
    """Every document is found once, contiguous, with its own labels and positions."""
    batch = pack_rows(docs, capacity, pad_id)
    for index, (ids, mask) in enumerate(docs):
        where = batch.document_ids_BT == index
        assert where.sum() == len(ids), "every document once"
        assert where.any(1).sum() == 1, "a document stays in one row"
        columns = where.any(0).nonzero().flatten()
        assert columns[-1] - columns[0] + 1 == len(ids), "contiguous"
        assert batch.input_ids_BT[where].tolist() == list(ids)
        assert batch.position_ids_BT[where].tolist() == list(range(len(ids)))
        expected = [t if mask is None or mask[k] else IGNORE for k, t in enumerate(ids)]
        expected[0] = IGNORE
        assert batch.labels_BT[where].tolist() == expected
    padding = batch.document_ids_BT == NO_DOCUMENT
    assert padding.sum() == batch.input_ids_BT.numel() - sum(len(ids) for ids, _ in docs)
    assert (batch.input_ids_BT[padding] == pad_id).all()
    assert (batch.labels_BT[padding] == IGNORE).all()
    return batch


def some_documents(seed=0, n=30, longest=16):
    rng = random.Random(seed)
    docs = []
    for _ in range(n):
        ids = [rng.randrange(1, 50) for _ in range(rng.randint(1, longest))]
        mask = None if rng.random() < 0.5 else [rng.randrange(2) for _ in ids]
        docs.append((ids, mask))
    return docs


def test_rows_hold_every_document_with_labels_positions_and_ids():
    batch = check_rows(some_documents(), 16, pad_id=0)
    assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.num_targets == int((batch.labels_BT >= 0).sum())


def test_pad_token_inside_a_document_stays_a_target():
    batch = pack_rows([([5, 0, 0], None)], 6, pad_id=0)  # pads are known by length, not by id
    assert batch.labels_BT.tolist() == [[IGNORE, 0, 0, IGNORE, IGNORE, IGNORE]]


def test_packed_attention_cannot_cross_documents():
    """Causal mean within (document, row) from the batch equals each document alone."""
    docs = some_documents(seed=3)
    batch = pack_rows(docs, 16, pad_id=0)
    same = batch.document_ids_BT[:, :, None] == batch.document_ids_BT[:, None, :]
    mask = (same & torch.ones(16, 16).tril().bool()).float()
    mean = (mask @ batch.input_ids_BT[..., None].float()).squeeze(-1) / mask.sum(-1)
    for index, (ids, _) in enumerate(docs):
        alone = torch.tensor(ids).float().cumsum(0) / torch.arange(1, len(ids) + 1)
        torch.testing.assert_close(mean[batch.document_ids_BT == index], alone)


def test_bad_masks_and_no_documents_are_refused():
    with pytest.raises(ValueError, match="document 0: 2 ids but 1 mask"):
        pack_rows([([1, 2], [1])], 4, 0)
    with pytest.raises(ValueError, match="no documents"):
        pack_rows([], 4, 0)


def test_rows_and_to_keep_all_four_tensors():
    batch = pack_rows(some_documents(), 16, 0)
    part = batch.rows(0, 1).to("cpu")
    assert part.labels_BT.equal(batch.labels_BT[:1])
    assert part.document_ids_BT.equal(batch.document_ids_BT[:1])


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("labels_BT[row, start] = IGNORE", "pass"),
        ("document_ids_BT[row, span] = index", "document_ids_BT[row, span] = 0"),
        ("np.arange(len(ids))", "np.arange(start, start + len(ids))"),
        ("start += len(ids)", "start += len(ids) - 1"),
    ],
)
def test_a_broken_line_is_noticed(line, broken, mutated):
    """The checks above fail when one line of pack_rows is wrong."""
    module = mutated(packing, line, broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "pack_rows", module.pack_rows)
        with pytest.raises((AssertionError, ValueError)):
            check_rows(some_documents(), 16, pad_id=0)
