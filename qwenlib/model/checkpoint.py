"""Standard Hugging Face model folders in and out: what one stage hands to the next."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwenlib.model.config import QwenConfig
from qwenlib.model.transformer import Qwen

if TYPE_CHECKING:
    from qwenlib.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"


def save_pretrained(
    model: Qwen, directory: str | Path, tokenizer: "Tokenizer | None" = None,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files.

    The weights file appears last and atomically: a folder that has it is complete.
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
        generation |= {**ids, "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    # An index left by a sharded save would send readers to the old shards.
    (directory / INDEX).unlink(missing_ok=True)
    os.replace(partial, directory / "model.safetensors")
    return directory


def load_pretrained(
    directory: str | Path, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None, **config_changes,
) -> Qwen:  # fmt: skip
    """Open a dense Qwen2.5 folder (one or sharded safetensors), tensor by tensor.

    config_changes replace fields of the stored config (say `yarn=…` for a longer context).
    Raises FileNotFoundError or ValueError naming what is missing, extra or misshapen.
    """
    directory = Path(directory)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} is not a model folder: it has no config.json")
    config = QwenConfig.from_hf(json.loads(config_file.read_text(encoding="utf-8")))
    if config_changes:
        config = config.replace(**config_changes)
    files = _weight_files(directory)
    with torch.device("meta"):
        model = Qwen(config)
    wanted = dict(model.state_dict())
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    seen: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as handle:
            for name in handle.keys():  # safe_open is no mapping
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                tensor = handle.get_tensor(name)
                if name not in wanted:
                    raise ValueError(f"{file.name} has a tensor this model lacks: {name}")
                if tensor.shape != wanted[name].shape:
                    raise ValueError(
                        f"{name} has shape {tuple(tensor.shape)}, "
                        f"config.json asks for {tuple(wanted[name].shape)}"
                    )
                seen[name] = tensor if dtype is None else tensor.to(dtype)
    missing = sorted(set(wanted) - set(seen))
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} tensors, first: {missing[0]}")
    model.load_state_dict(seen, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [directory / name for name in sorted(names)]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory} lacks {file.name}")
    return files


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
