"""GGUF files written from transformers models: weights, logits, metadata, and errors by name."""

import math
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader
from gguf.quants import dequantize

from qwenlib.model.config import YarnConfig
from qwenlib.model.gguf import load_gguf, read_gguf_config
from qwenlib.model.gguf_file import READABLE, read_gguf
from tests.model.gguf_files import (
    interleave,
    metadata_of,
    random_model,
    store,
    tensors_of,
    write_gguf,
)

IDS = torch.arange(96).flip(0).view(1, 96)
# Bytes of a block that hold its fp16 scales; any bits will do for the rest.
SCALES = {
    "Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210),
}  # fmt: skip


def save(folder, arch="qwen2", model=None, keys=None, drop=(), tensors=None, **writer):
    """A GGUF file of `model`; keys and tensors are added or replaced, a key of None is left out."""
    model = model or random_model(arch)
    metadata = metadata_of(model.config) | (keys or {})
    everything = tensors_of(arch, model.config, model.state_dict()) | (tensors or {})
    return write_gguf(
        f"{folder}/model.gguf",
        arch,
        {key: value for key, value in metadata.items() if value is not None},
        {name: tensor for name, tensor in everything.items() if name not in drop},
        **writer,
    )


def check_against(theirs, arch, kind="F32", keys=None):
    """Weights equal the dequantised ones bit for bit, and logits transformers' on the same."""
    tensors = tensors_of(arch, theirs.config, theirs.state_dict(), kind)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.from_numpy(dequantize(*store(parameter.detach(), kind))))
    with tempfile.TemporaryDirectory() as folder:
        ours = load_gguf(save(folder, arch, theirs, keys, tensors=tensors)).eval()
    wanted, seen = theirs.state_dict(), ours.state_dict()
    for name, tensor in seen.items():
        assert torch.equal(tensor, wanted.get(name, torch.zeros(()).expand_as(tensor))), name
    assert set(wanted) <= set(seen)
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    return ours


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_equal_to_transformers(arch, tied):
    ours = check_against(random_model(arch, tie_word_embeddings=tied), arch)
    assert ours.config.tie_word_embeddings == tied
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_equal_to_transformers(arch, kind):
    check_against(random_model(arch), arch, kind)


def test_llama_with_biases():
    """The converter permutes the biases of q and k like their weights."""
    theirs = random_model("llama", attention_bias=True)
    tensors = tensors_of("llama", theirs.config, theirs.state_dict())
    output = [name for name in tensors if name.endswith("attn_output.bias")]
    with tempfile.TemporaryDirectory() as folder:
        path = save(folder, "llama", theirs)
        with pytest.raises(ValueError, match=r"no place for: blk\.0\.attn_output\.bias"):
            load_gguf(path)
        ours = load_gguf(save(folder, "llama", theirs, drop=output)).eval()
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.bias.zero_()
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", READABLE)
def test_blocks_equal_another_implementation(kind):
    """Large tensors, read in several pieces, equal the whole tensor dequantised in torch."""
    model = random_model(
        "llama", vocab_size=4500, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    tensors = tensors_of("llama", model.config, model.state_dict())
    rng, code = np.random.default_rng(0), GGMLQuantizationType[kind]
    weights, size = GGML_QUANT_SIZES[code]
    for name, (array, _) in tensors.items():
        if array.ndim == 2 and kind in SCALES:  # the gguf package cannot write these
            blocks = rng.integers(0, 256, (array.size // weights, size), dtype=np.uint8)
            low, high = SCALES[kind]
            scales = rng.normal(size=(len(blocks), (high - low) // 2)).astype(np.float16)
            blocks[:, low:high] = scales.view(np.uint8)
            tensors[name] = blocks.reshape(len(array), -1), code
        elif array.ndim == 2:
            tensors[name] = store(array, kind)
    with tempfile.TemporaryDirectory() as folder:
        state = load_gguf(save(folder, "llama", model, tensors=tensors)).state_dict()
    stored = {"embed_tokens": "token_embd", "layers.0.mlp.up_proj": "blk.0.ffn_up"}
    for ours, name in stored.items():
        want = in_torch(tensors[f"{name}.weight"][0], kind)
        assert torch.equal(state[f"model.{ours}.weight"].flatten(), want), name
    q = state["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(interleave(q, 8), dequantize(*tensors["blk.0.attn_q.weight"]))


def in_torch(blocks, kind):
    raw = torch.from_numpy(blocks.copy()).flatten()
    if kind == "BF16":
        return raw.view(torch.bfloat16).float()
    if kind in ("F32", "F16"):
        return raw.float()
    if kind in ("Q5_0", "Q5_1"):  # transformers lacks them
        return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind])).flatten()
    theirs = pytest.importorskip("transformers.integrations.gguf.dequant")
    return theirs.dequantize(raw, int(GGMLQuantizationType[kind])).flatten()


def test_other_dtype(tmp_path):
    path = save(tmp_path, "llama")
    wide, narrow = load_gguf(path).state_dict(), load_gguf(path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in wide.items())


# The configuration


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_yarn_equals_transformers(arch):
    rope = {
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    keys = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32, "rope.scaling.finetuned": True,
    }  # fmt: skip
    ours = check_against(random_model(arch, rope_parameters=rope), arch, keys=keys)
    assert ours.config.yarn == YarnConfig(4.0, 32)


def config_of(keys, arch="qwen2", model=None):
    with tempfile.TemporaryDirectory() as folder:
        path = save(folder, arch, model, keys)
        assert load_gguf(path).config == read_gguf_config(path)
        return read_gguf_config(path)


def test_yarn_keys():
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}
    config = config_of(keys)
    assert config.yarn == YarnConfig(8.0, 128)  # the context length stands for the missing key
    keys |= {
        "rope.scaling.attn_factor": 0.5, "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_ext_factor": 1.0,
    }  # fmt: skip
    yarn = config_of(keys).yarn
    assert (yarn.beta_fast, yarn.beta_slow) == (16.0, 2.0)
    # llama.cpp multiplies its own factor into YaRN's.
    assert yarn.resolved_attention_factor == pytest.approx(0.5 * (1 + 0.1 * math.log(8)))


def test_defaults_and_wide_heads():
    keys = {"rope.freq_base": None, "expert_count": 0, "attention.causal": True, "vocab_size": 96}
    config = config_of(keys)
    assert config.rope_theta == 10_000.0
    assert config.rms_norm_eps == 1e-5  # as text, though fp32 in the file
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (16, 2, 96)
    assert config_of({"rope.dimension_count": 16}).head_dim == 16
    wide = random_model("llama", head_dim=32)
    keys = {"attention.key_length": 32, "attention.value_length": 32}
    assert config_of(keys, "llama", wide).head_dim == 32
    assert config_of({"rope.dimension_count": 32}, "llama", wide).head_dim == 32
    equal = random_model("llama", num_key_value_heads=4)
    assert config_of({"attention.head_count_kv": None}, "llama", equal).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"attention.sliding_window": 64}, "attention.sliding_window is 64"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.type is 'linear'"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        ({"rope.scaling.factor": 4.0}, "rope.scaling.factor is 4.0 without YaRN"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5},
            "rope.scaling.factor is 0.5",
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor is 0.5",
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1},
            "yarn_log_multiplier is 0.1",
        ),
        ({"rope.scale_linear": 2.0}, "rope.scale_linear is 2.0"),
        ({"rope.dimension_count": 8, "attention.key_length": 16}, "rope.dimension_count is 8"),
        ({"attention.value_length": 8}, "attention.value_length is 8"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"vocab_size": 95}, "vocab_size is 95"),
        ({"embedding_length": 32}, "embedding_length is 32"),
        ({"block_count": None}, "lacks the metadata key qwen2.block_count"),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks .*layer_norm_rms_epsilon"),
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"attention.head_count": 5}, "num_attention_heads 5"),
        ({"attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\], a positive whole"),
        ({"context_length": "long"}, "context_length is long, a positive whole number"),
        ({"rope.freq_base": 10_000}, "rope.freq_base is 10000, a number"),
    ],
)
def test_metadata_that_are_not_understood(keys, named):
    with tempfile.TemporaryDirectory() as folder:
        path = save(folder, keys=keys)
        with pytest.raises(ValueError, match=f"model.gguf.*{named}"):
            load_gguf(path)


@pytest.mark.parametrize("arch", ["qwen2moe", "gemma3", "qwen3"])
def test_other_architectures(arch, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", arch, {}, {"x": store(np.ones((1, 32)), "F32")})
    with pytest.raises(ValueError, match=f"model.gguf: general.architecture is '{arch}'"):
        read_gguf_config(path)


@pytest.mark.parametrize(
    ("arch", "change", "named"),
    [
        ("llama", {"tensors": {"rope_freqs.weight": 8}}, "no place for: rope_freqs.weight"),
        ("qwen2", {"tensors": {"blk.1.attn_q_norm.weight": 16}}, "no place for: .*attn_q_norm"),
        ("qwen2", {"tensors": {"blk.2.attn_norm.weight": 64}}, "no place for: blk.2.attn_norm"),
        ("qwen2", {"drop": ["blk.1.attn_k.bias"]}, r"lacks the tensor blk\.1\.attn_k\.bias"),
        ("llama", {"drop": ["blk.0.ffn_up.weight"]}, r"lacks the tensor blk\.0\.ffn_up\.weight"),
        ("llama", {"drop": ["token_embd.weight"]}, "lacks the tensor token_embd.weight"),
        ("llama", {"drop": ["output_norm.weight"]}, "lacks the tensor output_norm.weight"),
        (
            "qwen2",
            {"tensors": {"output_norm.weight": 32}},
            r"output_norm.weight has shape \(32,\), the metadata ask for \(64,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(arch, change, named):
    if "tensors" in change:
        change = {"tensors": {k: store(np.ones(n), "F32") for k, n in change["tensors"].items()}}
    with tempfile.TemporaryDirectory() as folder:
        path = save(folder, arch, **change)
        with pytest.raises(ValueError, match=f"model.gguf.*{named}"):
            load_gguf(path)


# The container


def vocabulary(n=40):
    return {
        "tokenizer.ggml.tokens": [f"tøken{i}" for i in range(n)],
        "tokenizer.ggml.token_type": [1] * n,
        "tokenizer.ggml.scores": [0.5] * n,
        "general.name": "a test",
        "general.quantization_version": 2,
    }


def test_header_equals_ggufreader(tmp_path):
    path = save(tmp_path, "llama", general=vocabulary())
    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape.tolist()[::-1])
        assert (mine.kind, mine.start) == (tensor.tensor_type, tensor.data_offset)


def test_other_alignment(tmp_path):
    model = random_model("qwen2")
    a = load_gguf(save(tmp_path, model=model))
    path = save(tmp_path, model=model, general={"general.alignment": 256})
    assert read_gguf(path).metadata["general.alignment"] == 256
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), load_gguf(path).parameters()))


def test_cut_anywhere_is_named():
    with tempfile.TemporaryDirectory() as folder:
        path = save(folder, "llama", general=vocabulary())
        with open(path, "rb") as file:
            whole = file.read()
        file = read_gguf(path)
        data = min(tensor.start for tensor in file.tensors.values())
        end = max(t.start + math.prod(t.shape) * 4 for t in file.tensors.values())
        for length in [*range(0, data, 3), *range(data, end, 997), end - 1]:
            with open(path, "wb") as file:
                file.write(whole[:length])
            what = "is not a GGUF file" if length < 4 else "is cut off or damaged: .*get it again"
            with pytest.raises(ValueError, match=f"model.gguf {what}"):
                read_gguf(path)


def test_cut_names_the_place(tmp_path):
    path = save(tmp_path, "llama", general=vocabulary())
    whole = read_gguf(path)
    name, last = max(whole.tensors.items(), key=lambda item: item[1].start)
    with open(path, "r+b") as file:
        file.truncate(last.start + 8)
    with pytest.raises(ValueError, match=f"the data of {name}"):
        load_gguf(path)
    with open(path, "r+b") as file:
        file.truncate(600)
    with pytest.raises(ValueError, match="the metadata key tokenizer.ggml.tokens"):
        load_gguf(path)


def test_no_gguf_and_other_byte_order(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 a zip file", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.gguf is not a GGUF file: give a"):
            load_gguf(path)
    with pytest.raises(FileNotFoundError, match="nothing.gguf"):
        load_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match="model.gguf is big-endian: convert it"):
        load_gguf(save(tmp_path, endianess=GGUFEndian.BIG))


def patched(folder, old, new, **options):
    """A file in which the only place of `old` is overwritten with `new`."""
    path = save(folder, **options)
    with open(path, "rb") as file:
        content = file.read()
    assert content.count(old) == 1 and len(old) == len(new)
    with open(path, "wb") as file:
        file.write(content.replace(old, new))
    return path


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b"GGUF\3\0\0\0", b"GGUF\1\0\0\0", "has GGUF version 1, 2 and 3 are known"),
        (b"GGUF\3\0\0\0", b"GGUF\4\0\0\0", "has GGUF version 4, 2 and 3 are known"),
        (b"general.name", b"general.n\xff\xfe\xfd", "not UTF-8"),
        (
            string("general.name") + struct.pack("<I", 8),
            string("general.name") + struct.pack("<I", 99),
            "general.name has the unknown type 99",
        ),
        (
            string("general.name") + struct.pack("<I", 8) + struct.pack("<Q", 6),
            string("general.name") + struct.pack("<I", 8) + struct.pack("<Q", 1 << 60),
            "general.name needs .* bytes of file",
        ),
        (
            string("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, 40),
            string("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, 1 << 61),
            "tokenizer.ggml.token_type needs .* bytes of file",
        ),
        (b"general.name", b"general.naem", None),
        (b"qwen2.block_count", b"qwen2.block_conut", "lacks the metadata key qwen2.block_count"),
        (
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 0),
            string("output_norm.weight") + struct.pack("<IQI", 9, 64, 0),
            "output_norm.weight has 9 dimensions",
        ),
        (
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 0),
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 26),
            "stores output_norm.weight as type I32: quantise the model to one of F32",
        ),
        (
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 0),
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 999),
            "stores output_norm.weight as type number 999",
        ),
        (
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 0),
            string("output_norm.weight") + struct.pack("<IQI", 1, 64, 12),
            "rows of output_norm.weight have 64 weights, no Q4_K blocks",
        ),
        (string("blk.0.attn_norm.weight"), string("blk.1.attn_norm.weight"), "two tensors blk.1"),
        (string("output.weight"), string("outpul.weight"), "no place for: outpul.weight"),
    ],
)
def test_damage_is_named(old, new, named, tmp_path):
    path = patched(tmp_path, old, new, general=vocabulary())
    if named is None:
        load_gguf(path)  # a name that does not matter
        return
    with pytest.raises(ValueError, match=f"model.gguf.*{named}"):
        load_gguf(path)


def test_damaged_general_keys(tmp_path):
    key = string("general.alignment") + struct.pack("<I", 4)
    path = patched(tmp_path, key + struct.pack("<I", 32), key + struct.pack("<I", 24),
                   general={"general.alignment": 32})  # fmt: skip
    with pytest.raises(ValueError, match="general.alignment is 24, no power of two"):
        read_gguf(path)
    path = patched(tmp_path, key + struct.pack("<I", 32), key + struct.pack("<I", 64),
                   general={"general.alignment": 32})  # fmt: skip
    with pytest.raises(ValueError, match="no multiple of 64|cut off or damaged"):
        read_gguf(path)
    twice = {"general.name": "a", "general.nam2": "b"}
    path = patched(tmp_path, b"general.nam2", b"general.name", general=twice)
    with pytest.raises(ValueError, match="has the metadata key general.name twice"):
        read_gguf(path)
    path = save(tmp_path, general={"split.count": 2, "split.no": 0})
    with pytest.raises(ValueError, match="one part of a split model: join the parts"):
        read_gguf(path)


PEAK = """
import sys
from qwenlib.model.gguf import load_gguf
load_gguf(sys.argv[1])  # a small one first: torch imports more when it builds a model
def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
before = peak()
model = load_gguf(sys.argv[2])
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
def test_peak_memory_stays_near_the_weights(tmp_path):
    small = save(tmp_path)
    (tmp_path / "large").mkdir()
    model = random_model("llama", vocab_size=60_000, hidden_size=512, intermediate_size=4096)
    tensors = tensors_of("llama", model.config, model.state_dict(), "Q8_0")
    large = save(tmp_path / "large", "llama", model, tensors=tensors)
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.1


# The real file


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_equals_transformers_own_reader():
    """512 tokens; transformers un-permutes the file by itself and runs it as a Llama."""
    from transformers import AutoModelForCausalLM

    from qwenlib import assets
    from qwenlib.tokenizer import Tokenizer

    try:
        path = assets.fetch("smollm2-135m-instruct")
    except assets.AssetError as error:
        pytest.skip(f"the model cannot be fetched: {str(error).splitlines()[0]}")
    text = (assets.__doc__ + AutoModelForCausalLM.from_pretrained.__doc__) * 4
    ids = torch.tensor([Tokenizer.from_gguf(path).encode(text)[:512]])
    assert ids.shape == (1, 512)
    ours = load_gguf(path).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
