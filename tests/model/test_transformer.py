"""The model against transformers' Qwen2 with every parameter redrawn, and against itself."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from qwenlib import kernels
from qwenlib.data.packing import pack_rows
from qwenlib.evaluation.verify import transformers_twin
from qwenlib.model import KVCache, MoEConfig, Qwen, QwenConfig, transformer
from qwenlib.model.config import YarnConfig

V, T = 101, 96
LAYOUTS = [(14, 2), (12, 2), (16, 2), (28, 4), (40, 8), (64, 8)]  # the seven sizes' heads
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def config(heads=6, kv_heads=2, head_dim=8, **changes) -> QwenConfig:
    # A large eps and a small base, so that a wrong place or sign of either shows at once.
    return QwenConfig(
        vocab_size=V, hidden_size=heads * head_dim, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=T,
        rope_theta=1000.0, rms_norm_eps=1e-2,
    ).replace(**changes)  # fmt: skip


@torch.no_grad()
def redraw(module, seed=0):
    """Every parameter anew: matrices of unit gain, biases and gains well away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if "embed" in name or "lm_head" in name:
            parameter.copy_(0.2 * draw)
        elif parameter.dim() == 2:
            parameter.copy_(draw / math.sqrt(parameter.shape[1]))
        elif name.endswith("bias"):
            parameter.copy_(0.5 * draw)
        else:
            parameter.copy_(1 + 0.5 * draw.clamp(-1.5, 1.5))
    return module.eval()


def ours(shape: QwenConfig, seed=0) -> Qwen:
    return redraw(Qwen(shape), seed)


def both(shape: QwenConfig):
    """The same weights in this library and in transformers."""
    model = ours(shape)
    return model, transformers_twin(model, "eager")


def tokens(B=2, length=T, seed=1):
    return torch.randint(0, V, (B, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads,kv_heads", LAYOUTS)
@torch.no_grad()
def test_logits_equal_transformers(heads, kv_heads):
    model, theirs = both(config(heads, kv_heads, head_dim=4))
    ids = tokens()
    torch.testing.assert_close(model(ids), theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"head_dim": 12},  # heads * head_dim differs from hidden_size
        {"yarn": YarnConfig(4.0, 24), "rope_theta": 100.0},
    ],
)
@torch.no_grad()
def test_variants_equal_transformers(changes):
    model, theirs = both(config(**changes))
    ids = tokens()
    torch.testing.assert_close(model(ids), theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_transformers_and_the_row_alone(side):
    model, theirs = both(config())
    ids, lengths = tokens(B=3), [T, 64, 70]
    mask = torch.zeros(3, T, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, T - length :] = 1 if side == "left" else 0
        mask[row, :length] = 1 if side == "right" else mask[row, :length]
    real, positions = mask.bool(), (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(ids, attention_mask_BS=mask)
    want = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[real], want[real], **CLOSE)
    for row in range(3):
        alone = model(ids[row][real[row]][None])[0]
        torch.testing.assert_close(got[row][real[row]], alone, **CLOSE)


@torch.no_grad()
def test_positions_start_behind_the_padding():
    """RoPE scores do not see a shift of all positions, so the shift is looked for by itself."""
    model, seen = ours(config()), []
    with pytest.MonkeyPatch.context() as patch:
        real = transformer.rope_tables
        patch.setattr(transformer, "rope_tables", lambda p, *a: seen.append(p) or real(p, *a))
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        model(tokens(length=4), attention_mask_BS=mask)
    assert seen[0].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@torch.no_grad()
def test_bf16_model_stays_near_fp32():
    model = ours(config())
    ids = tokens()
    want = model(ids)
    got = model.bfloat16()(ids)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 0.05 * want.abs().mean()


def test_norm_equals_transformers():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    theirs = Qwen2RMSNorm(48, eps=1e-3)
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(48, generator=generator) + 0.5
    theirs.weight.data.copy_(gain)
    x = 0.05 * torch.randn(4, 7, 48, generator=generator)
    torch.testing.assert_close(
        kernels.rms_norm(x, gain, 1e-3), theirs(x).detach(), atol=1e-6, rtol=1e-6
    )
    x, theirs = x.bfloat16(), theirs.bfloat16()
    got = kernels.rms_norm(x, theirs.weight, 1e-3)
    assert torch.equal(got, theirs(x))  # bit for bit: the order of casts is the released one


@pytest.mark.parametrize("heads,kv_heads", LAYOUTS)
def test_attention_equals_a_naive_loop_in_fp64(heads, kv_heads):
    B, length, K = 2, 7, 4
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, length, heads, K, generator=generator)
    k, v = torch.randn(2, B, length, kv_heads, K, generator=generator)
    mask = torch.rand(B, 1, length, length, generator=generator) < 0.6
    mask[0, 0, 3] = False  # a query that may look nowhere
    want = torch.zeros(B, length, heads, K, dtype=torch.float64)
    causal = torch.zeros_like(want)
    for b in range(B):
        for h in range(heads):
            g = h * kv_heads // heads
            for t in range(length):
                scores = (k[b, :, g].double() @ q[b, t, h].double()) / math.sqrt(K)
                values = v[b, :, g].double()
                causal[b, t, h] = scores[: t + 1].softmax(0) @ values[: t + 1]
                seen = mask[b, 0, t]
                if seen.any():
                    want[b, t, h] = scores[seen].softmax(0) @ values[seen]
    torch.testing.assert_close(kernels.attention(q, k, v).double(), causal, **CLOSE)
    torch.testing.assert_close(kernels.attention(q, k, v, mask).double(), want, **CLOSE)


@torch.no_grad()
def test_no_token_sees_the_future():
    model, ids = ours(config()), tokens(B=1)
    changed = ids.clone()
    changed[0, 50] = (changed[0, 50] + 1) % V
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :50], after[:, :50], atol=1e-6, rtol=0)
    assert (before[:, 50:] - after[:, 50:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_meta_construction_equals_the_ordinary_one():
    shape = config(yarn=YarnConfig(2.0, 32))
    model = ours(shape)
    with torch.device("meta"):
        copy = Qwen(shape)
    copy.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(copy.eval()(tokens()), model(tokens()))


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_cache_at_random_split_points(seed):
    """Chunks of any length, then single tokens, equal one forward pass; no mask anywhere."""
    model, ids, rng = ours(config()), tokens(B=2, length=64), random.Random(seed)
    cache = KVCache(model.config, 2, 64)
    parts, at = [], 0
    while at < 64:
        step = rng.choice([1, 1, 2, 5, 17])
        parts.append(model(ids[:, at : at + step], cache=cache))
        at += step
    assert cache.length == 64
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), **CLOSE)


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_cache_with_unequal_lengths(seed):
    """Left-padded rows, random split points: each row equals its own tokens run alone."""
    model, rng = ours(config()), random.Random(seed)
    lengths, total = [64, 41, 23, 64], 64
    ids = tokens(B=4, length=total, seed=seed)
    mask = torch.zeros(4, total, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, total - length :] = 1
    cache, parts, at = KVCache(model.config, 4, total + 3), [], 0
    while at < total:
        end = min(total, at + rng.choice([1, 1, 3, 30]))
        part = model(ids[:, at:end], attention_mask_BS=mask[:, :end], cache=cache)
        parts.append(part)
        at = end
    got = torch.cat(parts, 1)
    assert got.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, total - length :])[0]
        torch.testing.assert_close(got[row, total - length :], alone, **CLOSE)


@torch.no_grad()
def test_reorder_drops_and_repeats_rows():
    model, ids = ours(config()), tokens(B=3, length=20)
    cache = KVCache(model.config, 3, 21)
    model(ids[:, :19], cache=cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    got = model(ids[rows, 19:], cache=cache)
    torch.testing.assert_close(got[:, 0], model(ids)[rows, -1], **CLOSE)


def test_a_full_cache_and_packed_decoding_are_refused():
    model, ids = ours(config()), tokens(B=1, length=4)
    cache = KVCache(model.config, 1, 5)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="holds 5 tokens, 8 needed"):
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="packed documents"):
        model(ids[:, :1], document_ids_BT=torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_packed_row_equals_its_documents_alone():
    """Logits, and gradients of the summed loss, for rows with padding and short documents."""
    model, rng = ours(config()), random.Random(0)
    documents = [[rng.randrange(V) for _ in range(n)] for n in (40, 25, 1, 2, 30, 17)]
    batch = pack_rows([(ids, None) for ids in documents], 64, pad_id=0)
    assert (batch.document_ids_BT == -1).any()
    packed = model(batch.input_ids_BT, batch.position_ids_BT, batch.document_ids_BT)
    assert packed.isfinite().all()
    targets = batch.labels_BT[:, 1:]
    F.cross_entropy(packed[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for index, ids in enumerate(documents):
        alone = model(torch.tensor([ids]))
        torch.testing.assert_close(packed[batch.document_ids_BT == index], alone[0], **CLOSE)
        if len(ids) > 1:
            F.cross_entropy(alone[0, :-1], torch.tensor(ids[1:]), reduction="sum").backward()
    for got, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(
            got, parameter.grad, atol=1e-5 * float(got.abs().max()), rtol=1e-4
        )


@pytest.mark.parametrize("moe", [None, MoEConfig(6, 2, 8, 16)])
def test_gradient_checkpointing_changes_memory_alone(moe):
    """Equal loss and gradients for padded rows, and far fewer bytes kept for the backward pass."""
    model, ids = ours(config(moe=moe)).train(), tokens(B=3)
    mask = torch.arange(T) >= torch.tensor([0, 30, 60])[:, None]
    results = []
    for model.gradient_checkpointing in (False, True):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, attention_mask_BS=mask.long())[mask].square().mean()
        held = kept
        loss.backward()
        results.append((loss.detach(), held, [p.grad.clone() for p in model.parameters()]))
    (loss, bytes_1, grads), (loss_2, bytes_2, grads_2) = results
    assert torch.equal(loss, loss_2) and bytes_2 < 0.5 * bytes_1
    for a, b in zip(grads, grads_2, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    with torch.no_grad():
        assert model(ids).isfinite().all()


def test_tied_head_is_one_parameter():
    model = Qwen(config(tie_word_embeddings=True)).initialise(0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.shape == (V, 48) for p in model.parameters()) == 1


def test_initialise_is_seeded_and_scaled():
    shape = config(initializer_range=0.05)
    one, two, other = (
        Qwen(shape).initialise(3),
        Qwen(shape).initialise(3),
        Qwen(shape).initialise(4),
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    for name, parameter in one.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
