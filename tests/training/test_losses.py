"""The loss of packed rows: documents alone, ln V at the start, sums that add up."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qwenlib.data.packing import IGNORE, PackedBatch, pack_rows
from qwenlib.model import Qwen, QwenConfig
from qwenlib.training import held_out_loss, next_token_loss
from qwenlib.training.losses import bits_per_byte

V = 67


def model(seed=0, scale=0.3) -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_theta=100.0, initializer_range=scale,
    )  # fmt: skip
    return Qwen(shape).initialise(seed)


def documents(seed=0, lengths=(30, 12, 1, 9, 22, 2)):
    """(ids, mask) pairs, every other one masked as a conversation would be."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(V) for _ in range(n)],
            [rng.randrange(2) for _ in range(n)] if i % 2 else None,
        )
        for i, n in enumerate(lengths)
    ]


def test_packed_loss_and_gradients_equal_documents_alone():
    net, docs = model(), documents()
    batch = pack_rows(docs, 40, pad_id=0)
    loss, count, _ = next_token_loss(net, batch)
    loss.backward()
    packed = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    total, labels = 0.0, 0
    for ids, mask in docs:
        chosen = [t for t in range(1, len(ids)) if mask is None or mask[t]]
        if chosen:
            logits = net(torch.tensor([ids]))[0]
            targets = torch.tensor([ids[t] for t in chosen])
            alone = F.cross_entropy(logits[[t - 1 for t in chosen]], targets, reduction="sum")
            alone.backward()
            total, labels = total + alone.item(), labels + len(chosen)
    assert int(count) == labels
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for got, parameter in zip(packed, net.parameters(), strict=True):
        torch.testing.assert_close(
            got, parameter.grad, atol=1e-5 * float(got.abs().max()), rtol=1e-4
        )


def test_first_loss_is_ln_v():
    batch = pack_rows([([i % V for i in range(64)], None)] * 2, 64, pad_id=0)
    loss, count, _ = next_token_loss(model(scale=0.02), batch)
    assert loss.item() / int(count) == pytest.approx(math.log(V), abs=0.02)


def test_loss_and_accuracy_by_hand():
    logits = torch.zeros(1, 3, 2)
    logits[0, 0, 1] = math.log(3)  # predicts the second token with probability 3/4
    row = torch.zeros(1, 3, dtype=torch.long)
    labels = torch.tensor([[IGNORE, 1, 1]])
    head = SimpleNamespace(weight=torch.eye(2))  # the hidden state is the logits
    net = SimpleNamespace(hidden=lambda *inputs: logits, lm_head=head)
    loss, count, stats = next_token_loss(net, PackedBatch(row, labels, row, row))
    assert int(count) == 2
    assert loss.item() == pytest.approx(-math.log(3 / 4) + math.log(2), abs=1e-6)
    assert float(stats["token_accuracy"]) == 0.5  # the tie of the last position goes to token 0


def test_loss_and_gradients_equal_transformers():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    net = model()
    theirs = Qwen2ForCausalLM(Qwen2Config.from_dict(net.config.to_hf())).eval()
    theirs.load_state_dict(net.state_dict(), strict=False)
    ids = torch.randint(0, V, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(20) % 3 == 0, IGNORE, ids)
    want = theirs(input_ids=ids, labels=labels).loss
    want.backward()
    one_document = torch.zeros_like(ids)
    batch = PackedBatch(ids, labels, torch.arange(20).expand(3, -1), one_document)
    loss, count, _ = next_token_loss(net, batch)
    (loss / count).backward()
    torch.testing.assert_close(loss / count, want, rtol=1e-5, atol=1e-6)
    other = dict(theirs.named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-4, atol=1e-6)


def test_held_out_loss_is_a_mean_over_tokens_not_batches():
    net, docs = model().train(), documents(1)
    whole = pack_rows(docs, 40, pad_id=0)
    split = [whole.rows(i, i + 1) for i in range(len(whole.input_ids_BT))]
    loss, count, _ = next_token_loss(net, whole)
    assert held_out_loss(net, split) == pytest.approx(loss.item() / int(count), rel=1e-5)
    assert net.training, "the mode comes back"
    assert all(parameter.grad is None for parameter in net.parameters())


def test_no_labels_are_an_error():
    ids = torch.zeros(1, 4, dtype=torch.long)
    empty = PackedBatch(ids, torch.full_like(ids, IGNORE), torch.arange(4)[None], ids)
    with pytest.raises(ValueError, match="no labels"):
        held_out_loss(model(), [empty])


def test_bits_per_byte_by_hand():
    # 10 tokens of 2 ln 2 nats are 20 bits, over 40 bytes half a bit each.
    assert bits_per_byte(2 * math.log(2), 10, 40) == pytest.approx(0.5)
