"""Costs: the seven sizes of table 1 exactly, and formulas against the modules themselves."""

import pytest
import torch

from qwenlib.model import KVCache, Qwen, QwenConfig
from qwenlib.model.accounting import flops_per_token, kv_bytes_per_token, parameter_count
from qwenlib.model.presets import PRESETS, PUBLISHED_BILLIONS

# name: total, without embeddings, KV-cache bytes a token in bf16, rms_norm_eps.
EXACT = {
    "0.5b": (494_032_768, 357_898_112, 12_288, 1e-6),
    "1.5b": (1_543_714_304, 1_310_340_608, 28_672, 1e-6),
    "3b": (3_085_938_688, 2_774_773_760, 36_864, 1e-6),
    "7b": (7_615_616_512, 6_525_621_760, 57_344, 1e-6),
    "14b": (14_770_033_664, 13_212_898_304, 196_608, 1e-5),
    "32b": (32_763_876_352, 31_206_740_992, 262_144, 1e-5),
    "72b": (72_706_203_648, 70_214_787_072, 327_680, 1e-5),
}
TINY = QwenConfig(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, head_dim=8,
)  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_table_1(name):
    config, (total, non_embedding, cache_bytes, eps) = PRESETS[name], EXACT[name]
    count = parameter_count(config)
    assert (count.total, count.non_embedding) == (total, non_embedding)
    assert kv_bytes_per_token(config) == cache_bytes
    assert config.rms_norm_eps == eps and config.rope_theta == 1e6
    published_total, published_non_embedding = PUBLISHED_BILLIONS[name]
    assert total / 1e9 == pytest.approx(published_total, rel=0.01)
    assert non_embedding / 1e9 == pytest.approx(published_non_embedding, rel=0.01)


def test_presets_are_the_seven_of_the_report():
    assert set(PRESETS) == set(EXACT) == set(PUBLISHED_BILLIONS)


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), TINY, TINY.replace(tie_word_embeddings=True)]
)
def test_counts_equal_the_module(config):
    with torch.device("meta"):
        model = Qwen(config)
    assert parameter_count(config).total == sum(p.numel() for p in model.parameters())
    assert parameter_count(config).embedding == model.model.embed_tokens.weight.numel()


def test_cache_bytes_equal_the_cache():
    cache = KVCache(TINY, 3, 7, dtype=torch.bfloat16)
    stored = sum(x.numel() * x.element_size() for x in cache.keys + cache.values)
    assert stored == 3 * 7 * kv_bytes_per_token(TINY)
    assert kv_bytes_per_token(TINY, bytes_per_value=4) == 2 * kv_bytes_per_token(TINY)


def test_flops_equal_a_count_over_the_products():
    """Two FLOPs for every multiply-add of the forward pass, token by token."""
    context, H, K = 5, TINY.num_attention_heads, TINY.head_dim
    linear = [m.weight.numel() for m in Qwen(TINY).modules() if isinstance(m, torch.nn.Linear)]
    total = 0
    for token in range(context):
        seen = token + 1
        total += 2 * sum(linear) + TINY.num_hidden_layers * 2 * (2 * H * K * seen)
    assert flops_per_token(TINY, context) == pytest.approx(total / context)
    assert flops_per_token(TINY, context, training=True) == 3 * flops_per_token(TINY, context)
