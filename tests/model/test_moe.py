"""Experts against transformers and a loop, the balance loss against theirs, upcycling by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from qwenlib import kernels
from qwenlib.evaluation.verify import drawn_pair, redraw
from qwenlib.kernels import grouped, reference
from qwenlib.model import MoEConfig, Qwen, QwenConfig
from qwenlib.model.checkpoint import stored_tensors
from qwenlib.model.moe import (
    expert_units,
    load_balancing_loss,
    recorded_router,
    router_statistics,
    upcycle,
)

V, T = 53, 96


def config(**moe) -> QwenConfig:
    experts = {
        "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20, "mlp_only_layers": (1,),
    }  # fmt: skip
    return QwenConfig(
        vocab_size=V, hidden_size=32, intermediate_size=36, num_hidden_layers=3, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=T,
        moe=MoEConfig(**experts | moe),
    )  # fmt: skip


def tokens(rows=2, seed=1):
    return torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("moe", [{}, {"norm_topk_prob": True}, {"decoder_sparse_step": 2}])
def test_experts_equal_transformers(moe):
    """Logits and every gradient, with all parameters redrawn."""
    model, theirs = drawn_pair(config(**moe))
    ids = tokens()
    ours, want = model(ids), theirs(ids).logits
    torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)
    ours.square().mean().backward()
    want.square().mean().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        got, scale = parameter.grad, wanted[name].grad.abs().max()
        torch.testing.assert_close(got / scale, wanted[name].grad / scale, atol=2e-5, rtol=0)


def visits(N=37, D=16, width=12, E=6, C=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    gate_up = torch.randn(E, 2 * width, D, generator=generator)
    down = torch.randn(E, D, width, generator=generator)
    gates, experts = torch.randn(N, E, generator=generator).softmax(-1).topk(C)
    experts[experts == 2] = 3  # nobody visits expert 2
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), experts, gates.to(dtype)


def test_the_loop_equals_its_definition():
    x, gate_up, down, experts, gates = visits(dtype=torch.float64)
    want = torch.zeros_like(x)
    for n in range(len(x)):
        for c, expert in enumerate(experts[n]):
            gate, up = (gate_up[expert] @ x[n]).chunk(2)
            want[n] += gates[n, c] * down[expert] @ (gate / (1 + torch.exp(-gate)) * up)
    got = reference.expert_ffn(x, gate_up, down, experts, gates)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 5, 37])
def test_grouped_experts_equal_the_loop(rows):
    x, gate_up, down, experts, gates = visits(N=rows)
    assert grouped.usable(x, gate_up, down) == hasattr(F, "grouped_mm")
    leaves = [part.requires_grad_() for part in (x, gate_up, down, gates)]
    results = []
    for function in (reference.expert_ffn, kernels.expert_ffn):
        out = function(x, gate_up, down, experts, gates)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_widths_that_the_grouped_product_refuses_take_the_loop():
    parts = visits(D=15, width=13)
    assert not grouped.usable(*parts[:3])
    torch.testing.assert_close(kernels.expert_ffn(*parts), reference.expert_ffn(*parts))


@pytest.mark.parametrize("padded", [False, True])
def test_balance_equals_transformers(padded):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2 * T, 10, generator=generator) for _ in range(3)]
    mask = torch.rand(2, T, generator=generator) < 0.7 if padded else None
    want = load_balancing_loss_func(tuple(logits), 10, 3, None if mask is None else mask.long())
    flat = None if mask is None else mask.flatten()
    got = load_balancing_loss(logits, 3, flat, pooled=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    one = load_balancing_loss_func((logits[0],), 10, 3, None if mask is None else mask.long())
    torch.testing.assert_close(load_balancing_loss(logits[:1], 3, flat), one, atol=1e-5, rtol=1e-5)


def test_balance_at_its_ends():
    """Even use costs top_k; all tokens on the same three experts cost E; layers do not make up."""
    row = torch.tensor([3e-4] * 3 + [0.0] * 7)  # visits rotate, probabilities are flat
    even = torch.stack([row.roll(i) for i in range(10)])
    assert load_balancing_loss([even], 3).item() == pytest.approx(3.0, rel=1e-3)
    lopsided = torch.tensor([[50.0] * 3 + [0.0] * 7]).expand(20, 10)
    assert load_balancing_loss([lopsided], 3).item() == pytest.approx(10.0, rel=1e-3)
    mirrored = lopsided.roll(5, dims=1)
    both = load_balancing_loss([lopsided, mirrored], 3).item()
    assert both == pytest.approx(10.0, rel=1e-3)
    assert load_balancing_loss([lopsided, mirrored], 3, pooled=True).item() < 0.6 * both
    with pytest.raises(ValueError, match="recorded_router"):
        load_balancing_loss([], 3)


def test_recorded_router_sees_each_layer_and_carries_gradients():
    model = redraw(Qwen(config()))
    with recorded_router(model) as logits:
        model(tokens())
    assert [part.shape for part in logits] == [(2 * T, 10)] * 2  # layer 1 is dense
    load_balancing_loss(logits, 3).backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    model(tokens())
    assert len(logits) == 2, "recording ends with the block"
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        with recorded_router(Qwen(config().replace(moe=None))):
            pass


def test_router_statistics_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 3 + [[0.0, 0.0, 9.0, 9.0]])
    got = router_statistics(logits, 2, torch.tensor([1, 1, 1, 0]))
    p = logits[0].softmax(-1)
    torch.testing.assert_close(got.load_E, torch.tensor([0.5, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(got.probability_E, p)
    assert got.imbalance == pytest.approx(2.0) and got.kept == pytest.approx(float(p[:2].sum()))
    assert got.entropy == pytest.approx(float(-(p * p.log()).sum()))
    assert router_statistics(logits, 2).load_E.sum() == pytest.approx(1.0)


def test_units_are_shuffled_copies():
    """The 57B model's arithmetic: nine copies of 18,944 units, 6,656 units dropped."""
    units = expert_units(64, 2560, 18_944, torch.Generator().manual_seed(0))
    assert units.shape == (64, 2560)
    flat = units.flatten()
    for copy in range(8):
        part = flat[copy * 18_944 : (copy + 1) * 18_944]
        assert torch.equal(part.sort().values, torch.arange(18_944)), "each unit once a copy"
        assert not torch.equal(part, torch.arange(18_944)), "and in another order"
    rest = flat[8 * 18_944 :]
    assert len(rest) == 18_944 - 6656 and len(rest.unique()) == len(rest)


def dense(seed=0) -> Qwen:
    model = redraw(Qwen(config().replace(moe=None)), seed)
    model.config = model.config.replace(initializer_range=0.7)  # what upcycling draws with
    return model


def test_upcycling_without_redrawing_keeps_the_dense_function():
    """All experts chosen, of equal gates: E copies of each unit's share sum to the dense FFN."""
    old = dense()
    moe = MoEConfig(6, 6, 12, 36)  # two copies of 36 units in six experts of twelve
    new = upcycle(old, moe, seed=3, redraw=0.0)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for layer_old, layer_new in zip(old.model.layers, new.model.layers):
        layer_new.mlp.gate.weight.data.zero_()  # equal gates of 1/6
        layer_new.mlp.shared_expert_gate.weight.data.zero_()  # sigmoid(0) = 1/2
        want = layer_old.mlp(x) * (2 / 6 + 1 / 2)
        torch.testing.assert_close(layer_new.mlp(x), want, atol=1e-5, rtol=1e-5)
    for name in ("embed_tokens", "norm", "layers.1.self_attn", "layers.2.input_layernorm"):
        pair = (m.model.get_submodule(name).state_dict().values() for m in (old, new))
        assert all(torch.equal(a, b) for a, b in zip(*pair)), name
    assert torch.equal(old.lm_head.weight, new.lm_head.weight)


def test_half_of_each_expert_is_redrawn():
    old, moe = dense(), MoEConfig(10, 3, 12, 20, mlp_only_layers=(1,))
    same, half = upcycle(old, moe, 5, redraw=0.0), upcycle(old, moe, 5)
    for layer in (0, 2):
        kept, drawn = (m.model.layers[layer].mlp for m in (same, half))
        for name in ("gate_up_proj", "down_proj"):
            a, b = getattr(kept.experts, name), getattr(drawn.experts, name)
            shares = (a != b).flatten(1).float().mean(1)
            assert (shares == 0.5).all(), "exactly half of each expert's entries"
            assert b[a != b].std().item() == pytest.approx(0.7, rel=0.1), "at initializer_range"
        assert torch.equal(kept.shared_expert.up_proj.weight, drawn.shared_expert.up_proj.weight)
        units = {tuple(row.tolist()) for row in old.model.layers[layer].mlp.up_proj.weight}
        assert {tuple(row.tolist()) for row in drawn.shared_expert.up_proj.weight} <= units
    dense_layer = half.model.layers[1].mlp.down_proj.weight
    assert torch.equal(dense_layer, old.model.layers[1].mlp.down_proj.weight)


def test_upcycling_is_seeded_and_refuses_nonsense():
    old, moe = dense(), MoEConfig(4, 2, 8, 36)
    one, same, other = upcycle(old, moe, 1), upcycle(old, moe, 1), upcycle(old, moe, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.model.layers[0].mlp.experts.down_proj,
                           other.model.layers[0].mlp.experts.down_proj)  # fmt: skip
    with pytest.raises(ValueError, match="has experts already"):
        upcycle(one, moe, 1)
    with pytest.raises(ValueError, match="redraw must be a share"):
        upcycle(old, moe, 1, redraw=1.5)


def test_names_on_disk_are_views_of_the_model():
    model = redraw(Qwen(config()))
    tensors = stored_tensors(model)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    name = "model.layers.2.mlp.experts.7"
    gate, up, down = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    experts = torch.full((4, 1), 7)
    weights = model.model.layers[2].mlp.experts
    got = kernels.expert_ffn(x, weights.gate_up_proj, weights.down_proj, experts, torch.ones(4, 1))
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        down.zero_()
    assert weights.down_proj[7].abs().max() == 0


def test_initialise_draws_experts_too():
    model = Qwen(config()).initialise(0)
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert math.isfinite(float(model(tokens()).detach().mean()))
