"""The language-model loss, and its mean over held-out tokens.

A loss function maps (model, batch) to (loss_sum, count, stats): a sum and its denominator, so that
the loop can divide by one global count whatever the split into micro-batches.
Shapes: B batch, T time, V vocabulary.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def shifted_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in fp32 of predicting labels[:, 1:], and the number of real labels."""
    targets = labels_BT[:, 1:].reshape(-1)
    logits = logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]).float()
    loss_sum = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss_sum, (targets != IGNORED).sum()


def next_token_loss(model, batch) -> tuple[Tensor, Tensor, dict]:
    """Loss of a `PackedBatch`: a token sees only its document and no document's first token counts.

    Serves pretraining and SFT alike; SFT's labels are -100 outside the assistant's turns.
    """
    logits_BTV = model(batch.input_ids_BT, batch.position_ids_BT, batch.document_ids_BT)
    loss_sum, count = shifted_loss(logits_BTV, batch.labels_BT)
    return loss_sum, count, {}


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
