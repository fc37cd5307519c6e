"""The decoding step against the full forward pass, with every parameter redrawn."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenlib import kernels
from qwenlib.generation import generate
from qwenlib.generation.decoder import Decoder, stacked
from qwenlib.model import KVCache, MoEConfig, Qwen, QwenConfig
from qwenlib.model.config import YarnConfig

V, T = 61, 80
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
VARIANTS = {
    "grouped heads": {},
    "one kv head": {"num_key_value_heads": 1},
    "a kv head each": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "yarn": {"yarn": YarnConfig(4.0, 24)},
    "experts": {"moe": MoEConfig(6, 2, 20, 28, mlp_only_layers=(0,))},
}


def model(dtype=torch.float32, **changes) -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=48, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_theta=100.0, rms_norm_eps=1e-2, tie_word_embeddings=True,
    ).replace(**changes)  # fmt: skip
    net, generator = Qwen(shape), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = scale * draw + (1.0 if "norm" in name else 0.0)
    return net.to(dtype).eval()


def prefilled(net, ids_BT, lengths, at, room, fixed=False):
    """A decoder behind the first `at` columns of left-padded rows."""
    real = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    cache = KVCache(net.config, len(ids_BT), at, dtype=net.lm_head.weight.dtype)
    with torch.no_grad():
        net.hidden(ids_BT[:, :at], attention_mask_BS=real[:, :at].long(), cache=cache)
    cache.reorder(torch.arange(len(ids_BT)), max_length=room)
    return Decoder(net, cache, real[:, :at].long(), fixed), real


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_steps_equal_the_full_pass_at_random_split_points(variant, fixed):
    net, rng = model(**VARIANTS[variant]), random.Random(variant)
    ids = torch.randint(0, V, (5, T), generator=torch.Generator().manual_seed(1))
    for lengths in ([T] * 5, [T, 77, 60, 61, T]):
        at = rng.randrange(25, T - 10)
        decoder, real = prefilled(net, ids, lengths, at, T + 3, fixed)
        got = torch.stack([decoder.step(ids[:, t]) for t in range(at, T)], dim=1)
        for row, length in enumerate(lengths):
            alone = net(ids[row : row + 1, T - length :])[0, at - T :]
            torch.testing.assert_close(got[row], alone, **CLOSE)


@torch.no_grad()
def test_rows_leave_and_the_others_go_on():
    net = model()
    ids = torch.randint(0, V, (5, T), generator=torch.Generator().manual_seed(1))
    lengths = [T, 77, 60, 61, T]
    decoder, _ = prefilled(net, ids, lengths, 40, T)
    for t in range(40, 60):
        decoder.step(ids[:, t])
    rows = torch.tensor([3, 1])
    decoder.keep(rows)
    got = torch.stack([decoder.step(ids[rows, t]) for t in range(60, T)], dim=1)
    for place, row in enumerate(rows.tolist()):
        alone = net(ids[row : row + 1, T - lengths[row] :])[0, 60 - T :]
        torch.testing.assert_close(got[place], alone, **CLOSE)


@torch.no_grad()
def test_bf16_steps_stay_near_fp32():
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))
    want = model()(ids)[:, 50:]
    decoder, _ = prefilled(model(torch.bfloat16), ids, [T, T], 50, T)
    got = torch.stack([decoder.step(ids[:, t]) for t in range(50, T)], dim=1)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 0.05 * want.abs().mean()


def test_a_full_cache_is_refused():
    net = model()
    decoder, _ = prefilled(net, torch.zeros(1, T, dtype=torch.long), [T], 30, 31)
    decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="holds 31 tokens, 32 needed"):
        decoder.step(torch.tensor([1]))


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading numbers, or shapes that depend on them.

    Inside a CUDA graph each of them is an error.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_cpu", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.__name__
        if any(wait in name for wait in self.WAITS) or (
            name.startswith("index.")
            and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        ):
            self.seen.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("variant", ["grouped heads", "experts"])
@torch.no_grad()
def test_a_step_never_asks_the_device(variant):
    net = model(**VARIANTS[variant])
    ids = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(1))
    decoder, _ = prefilled(net, ids, [T, 60, 70], 50, T, fixed=True)
    with HostReads() as reads:
        torch.ones(2).nonzero()
    assert reads.seen, "the counter sees a wait"
    with HostReads() as reads:
        for t in range(50, 60):
            decoder.step(ids[:, t])
    assert reads.seen == []


def test_the_loop_looks_at_the_device_once_in_sixteen_steps(monkeypatch):
    from qwenlib.generation import sampler

    net = model()
    monkeypatch.setattr(sampler, "_LOOK_CPU", 16)
    want = generate(net, [[1, 2], [3]], 40, temperature=0.9, top_k=9, top_p=0.9, eos_ids=(5, 8))
    counts = []
    for steps in (17, 33):
        with HostReads() as reads:
            generate(net, [[1, 2, 3]], steps, temperature=0.9, top_k=9, top_p=0.9)
        counts.append(len(reads.seen))
    assert counts[0] == counts[1], "sixteen more steps cost no further wait"
    monkeypatch.setattr(sampler, "_LOOK_CPU", 1)
    again = generate(net, [[1, 2], [3]], 40, temperature=0.9, top_k=9, top_p=0.9, eos_ids=(5, 8))
    assert want == again


def test_stacked_parameters_share_memory_and_stay_apart():
    net = model()
    attention = net.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    before = torch.cat([part.detach().clone() for part in parts])
    whole = stacked(parts)
    assert torch.equal(whole, before) and all(isinstance(p, torch.nn.Parameter) for p in parts)
    assert [id(p) for p in parts] == [id(p) for p in attention.parameters() if p.dim() == 2][:3]
    assert stacked(parts).data_ptr() == whole.data_ptr(), "the second call moves nothing"
    with torch.no_grad():
        parts[1].add_(1.0)  # as an optimiser does
    assert torch.equal(whole, torch.cat([part.detach() for part in parts]))
    assert whole.untyped_storage().nbytes() == sum(part.nbytes for part in parts)


def test_generating_does_not_disturb_training():
    """Between two optimiser steps, also from inside inference_mode."""
    nets = [model(), model()]
    ids = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(1))
    for net, talks in zip(nets, (False, True)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(3):
            net(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if talks:
                with torch.inference_mode():
                    generate(net, [[1, 2, 3]], 3)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 32])
@pytest.mark.parametrize("size", [(512, 256), (130, 1100), (24, 16)])
def test_linear_of_few_rows_equals_the_ordinary_one(rows, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size[1], generator=generator)
    weight, bias = torch.randn(*size, generator=generator), torch.randn(size[0])
    for b in (bias, None):
        want = x.double() @ weight.double().T + (0.0 if b is None else b.double())
        got = kernels.linear(x, weight, b)
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


def test_decode_attention_equals_attention():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, 6, 8, generator=generator)
    k, v = torch.randn(2, 3, 11, 2, 8, generator=generator)
    seen = torch.rand(3, 1, 1, 11, generator=generator) < 0.7
    seen[..., -1] = True
    bias = torch.zeros(3, 1, 11).masked_fill(~seen[:, 0], -torch.inf)
    for mask, b in ((None, None), (seen, bias)):
        want = kernels.attention(q, k, v, mask)[:, 0]
        got = kernels.decode_attention(q[:, 0], k.transpose(1, 2), v.transpose(1, 2), b)
        torch.testing.assert_close(got, want, **CLOSE)
