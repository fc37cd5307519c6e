"""Label masks and the token-summed loss against naive loops."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qwenlib.data.packing import PackedBatch
from qwenlib.post_training.sft import IGNORE, labels_from_mask, sequence_logprobs
from qwenlib.training import next_token_loss


def batch(seed=0, B=3, T=7, V=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator)
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.6
    return logits, ids, mask


def sft_loss(logits, labels):
    """The loop's loss of a model whose last layer puts out these logits."""
    head = SimpleNamespace(weight=torch.eye(logits.shape[-1]))  # the hidden state is the logits
    model = SimpleNamespace(hidden=lambda *inputs: logits, lm_head=head)
    row = torch.zeros_like(labels)
    return next_token_loss(model, PackedBatch(row, labels, row, row))


def test_labels_mark_targets_by_position_and_never_the_first_token():
    pad = stop = 9  # padding with the stop token's id must not hide the real stop token
    ids = torch.tensor([[5, 6, 7, stop, pad, pad]])
    mask = torch.tensor([[1, 0, 1, 1, 0, 0]])
    assert labels_from_mask(ids, mask).tolist() == [[IGNORE, IGNORE, 7, stop, IGNORE, IGNORE]]
    with pytest.raises(ValueError, match="differ"):
        labels_from_mask(ids, mask[:, :3])


def test_logprobs_equal_a_naive_loop():
    logits, ids, mask = batch()
    labels = labels_from_mask(ids, mask)
    got, got_mask = sequence_logprobs(logits, labels, temperature=0.7)
    for b in range(3):
        for t in range(7):
            if t == 0 or not mask[b, t]:
                assert got[b, t] == 0 and not got_mask[b, t]
            else:
                want = torch.log_softmax(logits[b, t - 1] / 0.7, -1)[ids[b, t]]
                torch.testing.assert_close(got[b, t], want)
                assert got_mask[b, t]


def test_loss_is_the_sum_over_targets_of_cross_entropy():
    logits, ids, mask = batch(1)
    labels = labels_from_mask(ids, mask)
    loss, count, stats = sft_loss(logits, labels)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, want)
    assert count == (labels != IGNORE).sum()
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    torch.testing.assert_close(stats["token_accuracy"], right / count)


def test_uniform_logits_cost_ln_v_a_token():
    labels = torch.tensor([[IGNORE, 0, 1]])
    loss, count, _ = sft_loss(torch.zeros(1, 3, 2), labels)
    assert count == 2
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-6)


def test_micro_batches_of_unequal_length_add_up():
    logits, ids, _ = batch(2, B=2)
    labels = labels_from_mask(ids, torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0]]))
    whole, count, _ = sft_loss(logits, labels)
    parts = [sft_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(p[0] for p in parts) / sum(p[1] for p in parts), whole / count)


def test_without_targets_the_loss_is_a_zero_with_a_graph():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss, count, _ = sft_loss(logits, torch.full((2, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0 and count == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_nan_outside_the_targets_reaches_neither_value_nor_gradient():
    logits, ids, _ = batch(3)
    labels = labels_from_mask(ids, torch.tensor([[0, 1, 1, 1, 0, 0, 0]] * 3))
    spoiled = logits.clone()
    spoiled[:, 3:] = math.nan  # positions 0, 1, 2 predict the targets
    spoiled.requires_grad_()
    loss, _, _ = sft_loss(spoiled, labels)
    loss.backward()
    torch.testing.assert_close(loss, sft_loss(logits, labels)[0])
    assert spoiled.grad.isfinite().all()


def test_bf16_logits_are_scored_in_fp32():
    logits, ids, mask = batch(4)
    labels = labels_from_mask(ids, mask)
    got = sequence_logprobs(logits.bfloat16(), labels)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, sequence_logprobs(logits.bfloat16().float(), labels)[0])


def test_bad_shapes_and_temperature_are_named():
    logits, ids, _ = batch()
    with pytest.raises(ValueError, match="unshifted"):
        sequence_logprobs(logits, ids[:, 1:])
    with pytest.raises(ValueError, match="temperature"):
        sequence_logprobs(logits, ids, temperature=0.0)
