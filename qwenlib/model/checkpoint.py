"""Standard Hugging Face model folders in and out: what one stage hands to the next.

Weights are streamed, tensor by tensor, so that loading and saving need little more memory than
the model itself.
"""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qwenlib.model.config import QwenConfig
from qwenlib.model.transformer import Experts, Qwen

if TYPE_CHECKING:
    from qwenlib.tokenizer import Tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Pages of a file stay in memory while it is mapped, so it is mapped anew after this share of the
# model or, if that is more, after so many bytes.
_MAPPED_SHARE, _MAPPED_BYTES = 0.05, 1 << 20


def save_pretrained(
    model: Qwen, directory: str | Path, tokenizer: "Tokenizer | None" = None,
    dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9,
) -> Path:  # fmt: skip
    """Write config.json, generation_config.json, the weights and the tokenizer's files.

    Weights above max_shard_bytes go into numbered shards with an index. The single file, or the
    index, appears last and atomically: a folder that has it is complete.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = dtype or next(model.parameters()).dtype
    config = model.config.to_hf() | {"dtype": str(dtype).removeprefix("torch.")}
    generation = {"do_sample": False}
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config |= ids
        # Chat models stop at <|im_end|> or <|endoftext|>, as the released ones do.
        generation |= {**ids, "eos_token_id": [tokenizer.eos_token_id, tokenizer.end_of_text_id]}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)
    tensors = stored_tensors(model)
    size = dtype.itemsize
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.numel() * size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.numel() * size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards):
        _write_safetensors(directory / f"{name}.partial", shard, dtype)
    stale = {path.name for path in directory.glob("model*.safetensors")} - set(names)
    if len(shards) == 1:
        (directory / INDEX).unlink(missing_ok=True)  # it would send readers to the old shards
    for name in names:
        os.replace(directory / f"{name}.partial", directory / name)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in tensors.values()) * size
        places = {key: name for name, shard in zip(names, shards) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(directory / f"{INDEX}.partial", index)
        os.replace(directory / f"{INDEX}.partial", directory / INDEX)
    for name in stale:
        (directory / name).unlink()
    return directory


def load_pretrained(
    source: str | Path, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None, **config_changes,
) -> Qwen:  # fmt: skip
    """Open a model, dense or MoE: a folder, a GGUF file, a hub id or a registered name.

    `source` is anything that `sources.resolve_model` knows. dtype None keeps the stored one.
    config_changes replace fields of the stored config (say `yarn=…` for a longer context).
    Raises FileNotFoundError or ValueError naming what is missing, extra, misshapen or damaged;
    all of it is checked before the first weight is read.
    """
    from qwenlib.model.sources import resolve_model  # which converts with this module

    directory = resolve_model(source)
    config = read_config(directory)
    if config_changes:
        config = config.replace(**config_changes)
    with torch.device("meta"):
        model = Qwen(config)
    places = _places(directory, stored_tensors(model), config.tie_word_embeddings)
    dtypes = {name: dtype or place.dtype for name, place in places.items()}
    _materialise(model, dtypes, torch.device(device))
    targets = stored_tensors(model)
    # Largest first: its copy from the file is gone again when the model is nearly whole.
    order = sorted(places, key=lambda name: (-places[name].bytes, str(places[name].file)))
    with torch.no_grad():
        for batch in _batches(order, places):
            with _opened(places[batch[0]].file) as handle:
                for name in batch:
                    targets[name].copy_(handle.get_tensor(name))
    return model.requires_grad_(True)


def read_config(directory: str | Path) -> QwenConfig:
    """The configuration of a model folder; errors name the file."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a model folder: it has no config.json")
    try:
        return QwenConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def stored_tensors(model: Qwen) -> dict[str, Tensor]:
    """The model's tensors under their names on disk, as views: writing to one fills the model.

    A tied head is left out. The stacked experts appear one by one, as the releases store them.
    """
    out: dict[str, Tensor] = {}
    experts = {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for name in ("gate_up_proj", "down_proj")
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name not in experts:
            out[name] = tensor
            continue
        path, _, kind = name.rpartition(".")
        for number, weight in enumerate(tensor):
            if kind == "down_proj":
                out[f"{path}.{number}.down_proj.weight"] = weight
            else:
                gate, up = weight.chunk(2)
                out[f"{path}.{number}.gate_proj.weight"] = gate
                out[f"{path}.{number}.up_proj.weight"] = up
    return out


class _Place:
    """Where a stored tensor lies, and what it is there."""

    def __init__(self, file: Path, dtype: torch.dtype, numel: int):
        self.file, self.dtype, self.bytes = file, dtype, numel * dtype.itemsize


def _places(directory: Path, wanted: dict[str, Tensor], tied: bool) -> dict[str, _Place]:
    """Find and check every wanted tensor by the files' headers alone."""
    places: dict[str, _Place] = {}
    for file in _weight_files(directory):
        with _opened(file) as handle:
            for name in handle.keys():  # safe_open is no mapping
                if tied and name == "lm_head.weight":
                    continue
                if name not in wanted:
                    raise ValueError(f"{file} has a tensor this model lacks: {name}")
                if name in places:
                    raise ValueError(f"{name} is in both {places[name].file} and {file}")
                part = handle.get_slice(name)
                shape, code = tuple(part.get_shape()), part.get_dtype()
                if shape != tuple(wanted[name].shape):
                    raise ValueError(
                        f"{file}: {name} has shape {shape}, config.json asks for "
                        f"{tuple(wanted[name].shape)}"
                    )
                if code not in _DTYPES:
                    raise ValueError(
                        f"{file}: {name} is stored as {code}; known are {', '.join(_DTYPES)}. "
                        "A quantised folder has to be dequantised first"
                    )
                places[name] = _Place(file, _DTYPES[code], wanted[name].numel())
    missing = sorted(set(wanted) - set(places))
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} tensors, first: {missing[0]}")
    return places


def _materialise(model: Qwen, dtypes: dict[str, torch.dtype], device: torch.device) -> None:
    """Give a model on the meta device real, unfilled parameters of these dtypes."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    of_experts = {
        id(module): dtypes[f"{path}.0.down_proj.weight"]
        for path, module in model.named_modules()
        if isinstance(module, Experts)
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = of_experts.get(id(module)) or dtypes[names[id(parameter)]]
            real = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(real))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _batches(order: list[str], places: dict[str, _Place]) -> Iterable[list[str]]:
    """Runs of tensors of one file, each short enough to be mapped at once."""
    limit = max(_MAPPED_BYTES, _MAPPED_SHARE * sum(place.bytes for place in places.values()))
    batch: list[str] = []
    size = 0
    for name in order:
        place = places[name]
        if batch and (place.file != places[batch[0]].file or size + place.bytes > limit):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += place.bytes
    if batch:
        yield batch


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or cut off ({error}); fetch or write it again"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index} is damaged: {error!r}") from error
        files = [directory / name for name in sorted(names)]
    else:
        files = [directory / SINGLE]
    for file in files:
        if not file.is_file():
            others = sorted(path.name for path in directory.glob("*model*.*") if path != index)
            there = f"; it has {', '.join(others[:3])}" if others else ""
            raise FileNotFoundError(f"{directory} lacks {file.name}{there}")
    return files


def _write_safetensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The safetensors format, one tensor in memory at a time (the library's writer takes all).

    Eight bytes of header length, the header as JSON padded to eight bytes, then the data.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * dtype.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            plain = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(memoryview(plain.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
