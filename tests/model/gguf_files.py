"""Small GGUF files for tests, written as llama.cpp's converter writes them."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

OUTER = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
INNER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, leaf = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{leaf}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{INNER[inner]}.{leaf}"


def interleave(rows, heads):
    """Row order of q and k in a llama file: of each head 0, K/2, 1, K/2 + 1, …, one at a time."""
    rows = np.asarray(rows)
    size = len(rows) // heads
    order = [h * size + half * (size // 2) + i
             for h in range(heads) for i in range(size // 2) for half in (0, 1)]  # fmt: skip
    return rows[order]


def store(array, kind):
    """(array in the blocks of `kind`, its type), as the writer wants them."""
    code = GGMLQuantizationType[kind]
    return quantize(np.asarray(array, dtype=np.float32), code), code


def tensors_of(arch, config, state, kind="F32"):
    """{GGUF name: (array, type)}: matrices in `kind`, vectors in F32, q and k of llama permuted."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    out = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, array = gguf_name(name), tensor.detach().numpy()
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            array = interleave(array, heads[part])
        out[name] = store(array, kind if array.ndim == 2 else "F32")
    return out


def metadata_of(config) -> dict:
    """The architecture's keys of a transformers config, without their prefix."""
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }


def write_gguf(path, arch, metadata, tensors, general=None, **writer):
    """A GGUF file; `metadata` gets the architecture's prefix, `general` none."""
    file = GGUFWriter(path, arch, **writer)
    keys = {f"{arch}.{key}": value for key, value in metadata.items()} | (general or {})
    for key, value in keys.items():
        if key == "general.alignment":
            file.add_custom_alignment(value)
        elif isinstance(value, bool):
            file.add_bool(key, value)
        elif isinstance(value, int):
            file.add_uint32(key, value)
        elif isinstance(value, float):
            file.add_float32(key, value)
        elif isinstance(value, str):
            file.add_string(key, value)
        else:
            file.add_array(key, value)
    for name, (array, kind) in tensors.items():
        file.add_tensor(name, array, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def random_model(arch, seed=0, **changes):
    """A transformers model of two layers with every parameter redrawn."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    } | changes  # fmt: skip
    model = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if arch == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**shape))
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            scale = 0.5 if name.endswith("bias") else 0.15
            parameter.copy_(1 + 0.3 * draw if name.endswith("norm.weight") else scale * draw)
    return model.eval()
