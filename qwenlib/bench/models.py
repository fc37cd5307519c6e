"""The models that are timed, and what they read."""

import torch

from qwenlib.evaluation.verify import redraw, transformers_twin
from qwenlib.model import Qwen, QwenConfig

__all__ = ["draw", "transformers_twin", "weight_bytes"]


def draw(config: QwenConfig, seed: int, device: torch.device, dtype: torch.dtype) -> Qwen:
    """A model with every parameter drawn: no bias is zero and no gain one, or errors could hide."""
    return redraw(Qwen(config), seed).to(device, dtype)


def weight_bytes(model: Qwen) -> int:
    """Bytes of the weights that one decoding step reads: all but an untied input embedding."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.config.tie_word_embeddings:
        return total
    embedding = model.model.embed_tokens.weight
    return total - embedding.numel() * embedding.element_size()
