"""Rotary positions and YaRN: transformers' frequencies, golden values, relative positions."""

import math

import pytest
import torch

from qwenlib.kernels import apply_rope
from qwenlib.model import QwenConfig
from qwenlib.model.config import YarnConfig
from qwenlib.model.rope import inverse_frequencies, rope_frequencies, rope_tables, yarn_ramp


def config(head_dim, theta, yarn=None) -> QwenConfig:
    return QwenConfig(
        vocab_size=8, hidden_size=2 * head_dim, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32_768,
        rope_theta=theta, yarn=yarn,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "theta", "length", "low", "high"),
    [
        (128, 1e6, 32_768, 23, 40),  # Qwen2.5 7B
        (64, 1e6, 32_768, 11, 20),  # Qwen2.5 0.5B
        (128, 1e7, 262_144, 28, 43),  # Qwen2.5-Turbo's base and length
    ],
)
def test_golden_values_of_yarn(head_dim, theta, length, low, high):
    yarn = YarnConfig(4.0, length)
    got_low, got_high, share = yarn_ramp(head_dim, theta, yarn)
    assert (got_low, got_high) == (low, high)
    assert (share[: low + 1] == 0).all() and (share[high:] == 1).all()
    assert share[low + 1].item() == pytest.approx(1 / (high - low))
    frequencies, factor = rope_frequencies(config(head_dim, theta, yarn))
    assert factor == pytest.approx(1.138629, abs=1e-6)
    plain = inverse_frequencies(head_dim, theta)
    assert torch.equal(frequencies[: low + 1], plain[: low + 1])  # fast dimensions stay
    torch.testing.assert_close(frequencies[high:], plain[high:] / 4)  # slow ones are stretched


@pytest.mark.parametrize("factor", [1.0, 4.0, 7.5])
@pytest.mark.parametrize(
    ("head_dim", "theta", "length"),
    [(128, 1e6, 32_768), (64, 1e6, 32_768), (128, 1e7, 262_144), (16, 1e4, 64), (8, 1e4, 8)],
)
def test_yarn_equals_transformers(factor, head_dim, theta, length):
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = config(head_dim, theta, YarnConfig(factor, length))
    theirs = Qwen2Config(**ours.to_hf())
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    got, got_factor = rope_frequencies(ours)
    torch.testing.assert_close(got, frequencies, rtol=1e-6, atol=1e-9)
    assert got_factor == pytest.approx(attention_factor, abs=1e-9)


def test_tables_equal_transformers():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    for yarn in (None, YarnConfig(4.0, 64)):
        ours = config(16, 1e4, yarn)
        positions = torch.tensor([[0, 1, 2, 300, 30_000], [5, 5, 0, 63, 64]])
        cos, sin = Qwen2RotaryEmbedding(Qwen2Config(**ours.to_hf()))(torch.zeros(1), positions)
        got = rope_tables(positions, *rope_frequencies(ours), torch.float32)
        torch.testing.assert_close(got[0], cos)
        first, second = got[1].chunk(2, dim=-1)  # ours has the rotation's minus in it
        torch.testing.assert_close(torch.cat((-first, second), dim=-1), sin)


def test_scores_depend_on_the_distance_only():
    frequencies = inverse_frequencies(8, 1e4)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        at = [rope_tables(torch.tensor([[p]]), frequencies, 1.0, torch.float32) for p in (m, n)]
        return (apply_rope(q, *at[0]) * apply_rope(k, *at[1])).sum().item()

    assert score(7, 4) == pytest.approx(score(103, 100), abs=1e-5)
    assert abs(score(7, 4) - score(4, 7)) > 1e-2  # the direction counts
    assert score(5, 5) == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_rotation_by_hand():
    """Half-split pairs (x0, x2), (x1, x3) turn by the angles of their position."""
    tables = rope_tables(
        torch.tensor([[1]]), torch.tensor([math.pi / 2, math.pi]), 1.0, torch.float32
    )
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    want = torch.tensor([-3.0, -2.0, 1.0, -4.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(apply_rope(x, *tables), want, atol=1e-6, rtol=0)


def test_bf16_tables_are_rounded_after_the_angle():
    """Position 257 is no bf16 number: angles must be formed in fp32."""
    frequencies = inverse_frequencies(8, 1e4)
    cos, _ = rope_tables(torch.tensor([[257]]), frequencies, 1.0, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(257), abs=4e-3)
