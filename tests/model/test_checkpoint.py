"""Model folders: bit-equal round trips, transformers' reader, shards, and errors by name."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenlib.model import MoEConfig, Qwen, QwenConfig, load_pretrained, save_pretrained
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
MOE = MoEConfig(6, 2, 12, 20, mlp_only_layers=(0,))


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


@torch.no_grad()
def test_experts_round_trip_and_transformers(tmp_path):
    """Stacked in memory, one by one on disk: ours read by transformers and the other way round."""
    from transformers import AutoModelForCausalLM

    model = make(moe=MOE)
    save_pretrained(model, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.5.gate_proj.weight"].shape == (12, 24)
    assert not any("gate_up_proj" in name for name in stored)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=2e-5, rtol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    for folder in ("ours", "theirs"):
        copy = load_pretrained(tmp_path / folder).eval()
        assert copy.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters()))


@pytest.mark.parametrize("moe", [None, MOE])
def test_shards_of_our_own(moe, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(moe=moe)
    save_pretrained(make(moe=moe, num_hidden_layers=1), tmp_path)  # an older model lies there
    save_pretrained(model, tmp_path, max_shard_bytes=9000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].startswith("model-00001-of-"), shards
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(t.numel() * 4 for t in tensors.values()) <= 9000 or len(tensors) == 1
    for a, b in zip(model.parameters(), load_pretrained(tmp_path).parameters(), strict=True):
        assert torch.equal(a, b)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=2e-5, rtol=2e-5)
    save_pretrained(model, tmp_path)  # and back to one file
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


MEMORY = """
import ctypes, gc, re, sys, torch
from pathlib import Path
from qwenlib.model import Qwen, load_pretrained, presets, save_pretrained
folder, first = sys.argv[1], getattr(torch, sys.argv[2])

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak_of(action, *arguments, **options):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = status("VmRSS")
    model = action(*arguments, **options)
    return model, (status("VmHWM") - before) / sum(p.nbytes for p in model.parameters())

def save(model, dtype):
    save_pretrained(model, folder, dtype=dtype)
    return model

config = presets.find("teach-5m").replace(hidden_size=128)
load_pretrained(save_pretrained(Qwen(config).initialise(0), folder))  # libraries are in memory now
config = config.replace(vocab_size=4096, num_hidden_layers=20, hidden_size=512)
with torch.device("meta"):
    model = Qwen(config)
model.to_empty(device="cpu").initialise(0)
saved = [peak_of(save, model, dtype)[1] for dtype in (torch.bfloat16, torch.float32)]
del model
print(*saved, peak_of(load_pretrained, folder, dtype=first)[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_loading_and_saving(dtype, tmp_path):
    """Peaks of a process beyond what it held before, in sizes of the model (130 MB)."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    save_other, save, load = map(float, done.stdout.split())
    assert save < 0.2
    assert save_other < 0.2, "the copy in another dtype is never whole"
    assert 0.9 < load < 1.2, "of its own bytes, also when the file has twice as many"


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
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.end_of_text_id]
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


def test_damaged_files_are_named(tmp_path):
    """Cut anywhere, in the header or in the data, and never read as a whole model."""
    save_pretrained(make(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.safetensors is damaged or cut off"):
            load_pretrained(tmp_path)
    weights = load_file(_written(file, whole))
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, file)
    with pytest.raises(ValueError, match="model.norm.weight is stored as I8"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        load_pretrained(tmp_path)


def _written(file, data):
    file.write_bytes(data)
    return file


def test_a_tensor_in_two_shards_and_a_damaged_index(tmp_path):
    save_pretrained(make(), tmp_path, max_shard_bytes=9000)
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    weights = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file(weights | {name: tensor}, second)
    with pytest.raises(ValueError, match=f"{name} is in both .*00001.*00002"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(ValueError, match="index.json is damaged.*weight_map"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors; it has model-00001"):
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
