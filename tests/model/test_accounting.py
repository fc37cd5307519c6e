"""Costs: the seven sizes of table 1 exactly, and formulas against the modules themselves."""

import pytest
import torch

from qwenlib.model import KVCache, Qwen, QwenConfig, presets
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


# name: total, activated, activated without embeddings, in billions (arithmetic by hand).
EXPERTS = {"moe-a2.7b": (14.316, 2.689, 2.067), "moe-57b-a14b": (57.409, 14.249, 13.160)}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_the_released_models(name):
    count = parameter_count(presets.find(name))
    got = (count.total, count.activated, count.activated_non_embedding)
    assert tuple(round(value / 1e9, 3) for value in got) == EXPERTS[name]
    total, activated = presets.PUBLISHED_MOE_BILLIONS[name]
    assert count.total / 1e9 == pytest.approx(total, rel=0.01)
    assert count.activated / 1e9 == pytest.approx(activated, rel=0.02)


def test_presets_by_name():
    assert presets.find("7B") is PRESETS["7b"]
    instruct = presets.find("14b-instruct")
    assert (instruct.rms_norm_eps, instruct.max_position_embeddings) == (1e-6, 32_768)
    assert instruct.replace(rms_norm_eps=1e-5, max_position_embeddings=131_072) == PRESETS["14b"]
    with pytest.raises(ValueError, match="no preset '7bb': did you mean '7b'"):
        presets.find("7bb")
    for name, config in presets.TEACHING.items():
        sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim)
        if config.moe is not None:
            sizes += (config.moe.moe_intermediate_size, config.moe.shared_expert_intermediate_size)
        assert all(size % 64 == 0 for size in sizes), name
        billions = float(name.split("-")[-1].removesuffix("m")) / 1000
        assert parameter_count(config).total / 1e9 == pytest.approx(billions, rel=0.15), name


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(), *presets.MOE.values(), *presets.TEACHING.values(), TINY,
        TINY.replace(tie_word_embeddings=True),
    ],
)  # fmt: skip
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
