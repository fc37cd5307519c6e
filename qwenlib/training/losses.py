"""The language-model loss, and its mean over held-out tokens.

A loss function maps (model, batch) to (loss_sum, count, stats): a sum and its denominator, so that
the loop can divide by one global count whatever the split into micro-batches.
Shapes: B batch, T time, D hidden, V vocabulary, M positions with a target.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from qwenlib import kernels

IGNORED = -100


def next_token_loss(model, batch) -> tuple[Tensor, Tensor, dict]:
    """Loss of a `PackedBatch`: a token sees only its document and no document's first token counts.

    Serves pretraining and SFT alike; SFT's labels are -100 outside the assistant's turns. Labels
    are unshifted: the output at t is scored on labels[t + 1], and only positions with a target go
    through the head. Statistics: token_accuracy, the share of targets that were the likeliest.
    """
    x_BTD = model.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.document_ids_BT)
    has_target_BT = batch.labels_BT[:, 1:] != IGNORED
    targets_M = batch.labels_BT[:, 1:][has_target_BT]
    x_MD = x_BTD[:, :-1][has_target_BT]
    loss_sum, correct = kernels.linear_cross_entropy(x_MD, model.lm_head.weight, targets_M)
    count = has_target_BT.sum()
    return loss_sum, count, {"token_accuracy": correct / count.clamp(min=1)}


@torch.no_grad()
def held_out_loss(model, batches: Iterable, loss_fn=next_token_loss) -> float:
    """Mean loss in nats a token over the batches; NaN-free only if some label counts."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        loss_sum, n, _ = loss_fn(model, batch)
        total, count = total + float(loss_sum), count + int(n)
    model.train(was_training)
    if count == 0:
        raise ValueError("held-out batches hold no labels; check their masks")
    return total / count


def bits_per_byte(loss_nats: float, tokens: int, utf8_bytes: int) -> float:
    """Loss a token to bits a UTF-8 byte: comparable between tokenizers."""
    return loss_nats * tokens / utf8_bytes / math.log(2)
