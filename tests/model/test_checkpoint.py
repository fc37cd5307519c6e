"""Model folders: bit-equal round trips, transformers' reader, shards, and errors by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenlib.model import Qwen, QwenConfig, load_pretrained, save_pretrained
from qwenlib.model.config import YarnConfig
from qwenlib.tokenizer import Tokenizer


def make(tied=False, **changes) -> Qwen:
    shape = QwenConfig(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_theta=1000.0, tie_word_embeddings=tied,
    ).replace(**changes)  # fmt: skip
    generator, model = torch.Generator().manual_seed(0), Qwen(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("yarn", [None, YarnConfig(2.0, 32)])
def test_round_trip_and_transformers(tied, yarn, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(tied, yarn=yarn)
    save_pretrained(model, tmp_path)
    copy = load_pretrained(tmp_path).eval()
    assert copy.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters()))
    assert all(p.requires_grad for p in copy.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    with torch.no_grad():
        assert torch.equal(copy(IDS), model(IDS))
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_in_shards(tied, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = make(tied)
    theirs = Qwen2ForCausalLM(Qwen2Config(**model.config.to_hf()))
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    copy = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters()))
    tied_now = copy.lm_head.weight is copy.model.embed_tokens.weight
    assert tied_now == tied
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load_pretrained(tmp_path)
    other = make(tied)
    other.model.norm.weight.data += 1.0
    save_pretrained(other, tmp_path)  # over the shards: the new weights must be the ones read
    for a, b in zip(load_pretrained(tmp_path).parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dtype_on_the_way_out_and_in(tmp_path):
    model = make()
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_pretrained(tmp_path)
    assert all(p.dtype == torch.bfloat16 for p in stored.parameters())
    wide = load_pretrained(tmp_path, dtype=torch.float32)
    want = model.lm_head.weight.bfloat16().float()
    assert torch.equal(wide.lm_head.weight, want)


def test_config_changes_on_loading(tmp_path):
    save_pretrained(make(), tmp_path)
    yarn = YarnConfig(4.0, 64)
    assert load_pretrained(tmp_path, yarn=yarn).config.yarn == yarn
    with pytest.raises(TypeError, match="rope_theta"):
        load_pretrained(tmp_path, rope_thetta=1.0)


def test_tokenizer_travels_along(tmp_path):
    tokenizer = Tokenizer.from_merges([])
    save_pretrained(make(vocab_size=tokenizer.vocab_size), tmp_path, tokenizer)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert not any(name.endswith(".partial") for name in names)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == (
        tokenizer.eos_token_id
    )
    assert Tokenizer.from_pretrained(tmp_path).encode("hi") == tokenizer.encode("hi")


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.k_proj.bias"), "lacks 1 tensors.*k_proj.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "a tensor this model lacks: extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(25)}),
            r"model.norm.weight has shape \(25,\).*\(24,\)",
        ),
    ],
)
def test_wrong_weights_are_named(change, message, tmp_path):
    save_pretrained(make(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_pretrained(tmp_path)
    save_pretrained(make(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm": 1e-5}))
    with pytest.raises(ValueError, match="unknown keys.*rms_norm"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_pretrained(tmp_path)
