"""GGUF checkpoints in: llama.cpp's `llama` and `qwen2` files as our dense `Qwen`.

Names and the order of rows are llama.cpp's; the block formats are the gguf package's `dequantize`.
"""

import math
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from gguf import dequantize
from torch import Tensor

from qwenlib.model.config import QwenConfig, YarnConfig
from qwenlib.model.gguf_file import GGUFFile, GGUFTensor, read_gguf
from qwenlib.model.transformer import Qwen

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_KINDS = {int: "a positive whole number", float: "a number", str: "a text", bool: "true or false"}
_BIASED = ("attn_q", "attn_k", "attn_v")
# Dequantised in pieces of about this many weights, so that the copy beside the model stays small.
_CHUNK = 1 << 20


def read_gguf_config(path: str | Path) -> QwenConfig:
    """The configuration in a GGUF file; a key that would change the network is a ValueError."""
    return _config(read_gguf(path))


def load_gguf(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen:
    """Open a GGUF file of a `llama` or `qwen2` model, dequantised piece by piece into `dtype`.

    A llama model is a Qwen2 model with zero q, k and v biases. ValueError names the file and the
    key or tensor that is unknown, missing, extra or misshapen.
    """
    file = read_gguf(path)
    config, is_llama = _config(file), file.metadata["general.architecture"] == "llama"
    with torch.device("meta"):
        model = Qwen(config)
    wanted = model.state_dict()
    names = _names(config)
    _check_tensors(file, {name: tuple(wanted[ours].shape) for name, ours in names.items()})
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state: dict[str, Tensor] = {}
    with open(file.path, "rb") as handle:
        for name, ours in names.items():
            state[ours] = torch.zeros(wanted[ours].shape, dtype=dtype, device=device)
            if name in file.tensors:
                _fill(state[ours], handle, file.tensors[name])
            part = name.split(".")[-2]
            if is_llama and part in heads:
                state[ours] = _unpermute(state[ours], heads[part])
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def _config(file: GGUFFile) -> QwenConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise ValueError(
            f"{file.path}: general.architecture is {architecture!r}, not llama or qwen2"
        )
    get = _Keys(file, architecture)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight (vocabulary, hidden)")
    vocab_size, hidden_size = embedding.shape
    heads = get("attention.head_count", int)
    rotated = get("rope.dimension_count", int, hidden_size // heads)
    head_dim = get("attention.key_length", int, rotated)
    get.expect("vocab_size", vocab_size)
    get.expect("embedding_length", hidden_size)
    get.expect("attention.value_length", head_dim)
    get.expect("rope.dimension_count", head_dim)  # partial rotation is another network
    get.expect("attention.causal", True)
    get.expect("rope.scale_linear", 1.0)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "max_position_embeddings": get("context_length", int),
        "head_dim": head_dim,
        "rope_theta": get("rope.freq_base", float, 10_000.0),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "yarn": _yarn(get),
    }
    get.refuse_unread()
    try:
        return QwenConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _yarn(get: "_Keys") -> YarnConfig | None:
    kind, factor = get("rope.scaling.type", str, ""), get("rope.scaling.factor", float, 1.0)
    get("rope.scaling.finetuned", bool, False)  # a note, it changes nothing
    if kind in ("", "none"):
        if factor not in (0.0, 1.0):  # llama.cpp takes a bare factor for a linear one
            get.fail("rope.scaling.factor", f"is {factor} without YaRN")
        return None
    if kind != "yarn":
        get.fail("rope.scaling.type", f"is {kind!r}; 'none' and 'yarn' are supported")
    if factor < 1.0:
        get.fail("rope.scaling.factor", f"is {factor}, below 1")
    get.expect("rope.scaling.yarn_ext_factor", 1.0)
    scale = get("rope.scaling.attn_factor", float, 1.0)
    scale *= get("rope.scaling.yarn_attn_factor", float, 1.0)
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=get(
            "rope.scaling.original_context_length", int, get("context_length", int)
        ),
        beta_fast=get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", float, 1.0),
        attention_factor=None if scale == 1.0 else scale * (0.1 * math.log(factor) + 1.0),
    )


class _Keys:
    """Typed access to the architecture's metadata that remembers what nobody asked for."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.prefix = file, f"{architecture}."
        self.unread = {key for key in file.metadata if key.startswith(self.prefix)}

    def __call__(self, key: str, kind: type, default: Any = None) -> Any:
        self.unread.discard(self.prefix + key)
        value = self.file.metadata.get(self.prefix + key, default)
        if value is None:
            raise ValueError(f"{self.file.path} lacks the metadata key {self.prefix}{key}")
        if type(value) is not kind or (kind is int and value <= 0):
            self.fail(key, f"is {str(value)[:40]}, {_KINDS[kind]} was expected")
        # Stored in fp32: the nearest short decimal is 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value))) if kind is float else value

    def expect(self, key: str, expected: Any) -> None:
        if (value := self(key, type(expected), expected)) != expected:
            self.fail(key, f"is {value}, this model needs {expected}")

    def refuse_unread(self) -> None:
        for key in sorted(self.unread):
            value = self.file.metadata[key]
            if value not in (0, "", []):  # zero or false: switched off, as a dense file's experts
                self.fail(key.removeprefix(self.prefix), f"is {str(value)[:40]}, unknown here")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ValueError(f"{self.file.path}: {self.prefix}{key} {problem}")


def _names(config: QwenConfig) -> dict[str, str]:
    """GGUF names of every tensor and ours."""
    names = dict(_OUTER)
    if config.tie_word_embeddings:
        del names["output.weight"]
    for i in range(config.num_hidden_layers):
        for part, ours in _BLOCK.items():
            for leaf in ("weight", "bias") if part in _BIASED else ("weight",):
                names[f"blk.{i}.{part}.{leaf}"] = f"model.layers.{i}.{ours}.{leaf}"
    return names


def _check_tensors(file: GGUFFile, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in file.tensors.items():
        if name not in shapes:
            raise ValueError(f"{file.path} has a tensor that this model has no place for: {name}")
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{file.path}: {name} has shape {tensor.shape}, the metadata ask for {shapes[name]}"
            )
    is_llama = file.metadata["general.architecture"] == "llama"
    for name in shapes:
        if name not in file.tensors and not (is_llama and name.endswith(".bias")):
            raise ValueError(f"{file.path} lacks the tensor {name}")


def _fill(target: Tensor, handle: BinaryIO, tensor: GGUFTensor) -> None:
    rows = target.view(-1, tensor.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    handle.seek(tensor.start)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        raw = np.fromfile(handle, np.uint8, len(part) * tensor.row_bytes)
        part.copy_(torch.from_numpy(dequantize(raw.reshape(len(part), -1), tensor.kind)))


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """Halves of each head side by side again; llama.cpp's rotation wants them interleaved."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
