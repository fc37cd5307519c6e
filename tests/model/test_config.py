"""Configurations: Hugging Face's spellings in and out, and errors that name the key."""

import json

import pytest

from qwenlib.model import MoEConfig, QwenConfig, presets
from qwenlib.model.config import YarnConfig

BASE = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "qkv_bias": True,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


def config(**changes) -> QwenConfig:
    return QwenConfig.from_hf({**BASE, **changes})


def test_fields_are_read_and_head_dim_follows():
    got = config()
    assert got.head_dim == 16 and got.rms_norm_eps == 1e-5 and got.tie_word_embeddings
    assert got.rope_theta == 1e6 and got.yarn is None
    assert config(head_dim=32).head_dim == 32


@pytest.mark.parametrize("yarn", [None, YarnConfig(4.0, 1024, attention_factor=1.5)])
def test_round_trip_through_json(yarn):
    first = config().replace(yarn=yarn, head_dim=8)
    assert QwenConfig.from_hf(json.loads(json.dumps(first.to_hf()))) == first


@pytest.mark.parametrize("yarn", [None, YarnConfig(4.0, 1024)])
def test_round_trip_through_transformers(yarn, tmp_path):
    """What transformers 5 writes (rope_parameters, layer_types, …) is read back the same."""
    from transformers import Qwen2Config

    first = config().replace(yarn=yarn)
    Qwen2Config(**first.to_hf()).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert "rope_parameters" in text
    assert QwenConfig.from_hf(json.loads(text)) == first


@pytest.mark.parametrize(
    "entry",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **YARN}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ],
)
def test_both_rope_spellings(entry):
    got = config(**entry)
    assert got.rope_theta == 1e6 and got.yarn == YarnConfig(4.0, 1024)


def test_default_rope_and_a_missing_base():
    plain = {"rope_type": "default", "rope_theta": 5e5}
    assert config(rope_theta=None, rope_parameters=plain).rope_theta == 5e5
    assert config(rope_theta=None).rope_theta == 10_000.0  # transformers' default for Qwen2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1: only 0.0"),
        ({"use_mrope": True}, "use_mrope"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({**EXPERTS, "qkv_bias": False}, "qkv_bias is False"),
        ({**EXPERTS, "num_experts": None}, "lacks num_experts"),
        ({**EXPERTS, "num_experts_per_tok": 61}, "num_experts_per_tok 61"),
        ({**EXPERTS, "n_group": 4}, "n_group"),
        ({**EXPERTS, "moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rms_norm_epsilon": 1e-5}, "rms_norm_epsilon.*nearest known: rms_norm_eps"),
        ({"qk_norm": True}, "qk_norm"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", **YARN}}, "two types"),
        ({"rope_scaling": {"type": "yarn", "mscale": 1.0, **YARN}}, "mscale"),
        ({"rope_scaling": {"factor": 2.0}}, "factor.*unused"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": 0.5}}, "at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "hidden_size 64"),
        ({"head_dim": 15}, "even"),
    ],
)
def test_a_key_that_would_change_the_network_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_experts_are_read_and_written():
    got = config(**EXPERTS | {"mlp_only_layers": [1]})
    assert got.moe == MoEConfig(60, 4, 32, 96, mlp_only_layers=(1,))
    assert [got.is_moe_layer(i) for i in range(4)] == [True, False, True, True]
    sparse = MoEConfig(60, 4, 32, 96, decoder_sparse_step=2)
    assert [got.replace(moe=sparse).is_moe_layer(i) for i in range(4)] == [False, True] * 2
    assert QwenConfig.from_hf(json.loads(json.dumps(got.to_hf()))) == got
    assert got.to_hf()["architectures"] == ["Qwen2MoeForCausalLM"]
    assert not config().is_moe_layer(0)


@pytest.mark.parametrize("name", presets.names())
def test_presets_survive_transformers(name, tmp_path):
    from transformers import Qwen2Config, Qwen2MoeConfig

    first = presets.find(name)
    theirs = Qwen2Config if first.moe is None else Qwen2MoeConfig
    theirs(**first.to_hf()).save_pretrained(tmp_path)
    assert QwenConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == first


def test_inert_keys_are_accepted():
    assert config(sliding_window=131_072, max_window_layers=70, new_switch=None) == config()


def test_replace_names_the_nearest_field():
    with pytest.raises(TypeError, match="did you mean 'rope_theta'"):
        config().replace(rope_thetta=1.0)


def test_attention_factor_of_yarn():
    assert YarnConfig(1.0, 64).resolved_attention_factor == 1.0
    assert YarnConfig(4.0, 64, attention_factor=2.0).resolved_attention_factor == 2.0
    with pytest.raises(ValueError, match="positive"):
        YarnConfig(2.0, 0)
