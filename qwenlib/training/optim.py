"""AdamW with decoupled weight decay on matrices only."""

import torch
from torch import nn


def adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW over the trainable parameters; norms and biases (one dimension) never decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
