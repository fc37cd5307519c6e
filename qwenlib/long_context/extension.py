"""Context extension: adaptive base frequency (ABF) for training, YaRN for inference."""

from pathlib import Path

import torch

from qwenlib.model import Qwen, load_pretrained
from qwenlib.model.config import YarnConfig


def extend_base(
    directory: str | Path, max_position_embeddings: int, rope_theta: float,
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
) -> Qwen:  # fmt: skip
    """Open a model with a larger RoPE base, ready to be trained at the longer length.

    The report goes from base 10,000 to 1,000,000 (arXiv 2309.16039): every pair of dimensions
    turns more slowly, so a longer context stays within angles seen in training, at the price of a
    model that has to be trained on. Raises ValueError when base or length would shrink.
    """
    model = load_pretrained(directory, device, dtype)
    config = model.config
    if rope_theta < config.rope_theta or max_position_embeddings < config.max_position_embeddings:
        raise ValueError(
            f"extension shrinks the model: base {config.rope_theta:g} -> {rope_theta:g}, length "
            f"{config.max_position_embeddings} -> {max_position_embeddings}"
        )
    return load_pretrained(
        directory, device, dtype, rope_theta=float(rope_theta),
        max_position_embeddings=max_position_embeddings,
    )  # fmt: skip


def with_yarn(
    directory: str | Path, factor: float, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Qwen:  # fmt: skip
    """Open a model for `factor` times its trained length with YaRN; no training needed.

    The scaling is static: it acts on short texts too, where it can hurt, so a model folder is
    handed on without it and the reader switches it on. Raises ValueError when the folder carries
    YaRN already: its length is then no longer the trained one.
    """
    config = load_pretrained(directory, "cpu", dtype).config
    if config.yarn is not None:
        raise ValueError(
            f"{directory} carries YaRN by {config.yarn.factor:g} already; open it with "
            "load_pretrained, or take rope_scaling out of its config.json first"
        )
    length = config.max_position_embeddings
    return load_pretrained(
        directory, device, dtype, yarn=YarnConfig(float(factor), length),
        max_position_embeddings=round(length * factor),
    )  # fmt: skip
