"""How a model computes while it is trained: its blocks compiled, and run again for memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from qwenlib.model.transformer import MLP, Block


@contextmanager
def compiled(model: nn.Module, on: bool) -> Iterator[None]:
    """With `on`, the model's blocks are compiled by torch.compile inside; the model stays the same.

    Block by block, because all are alike: one compilation (some seconds, after that from PyTorch's
    cache) serves them all. Mixture-of-experts layers compile their attention and shared expert; the
    routed experts are one fused operation already. A model of other parts is compiled as a whole.
    """
    parts = _parts(model) if on else []
    for part in parts:
        part.compile()
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = (
                None  # what Module.compile sets; nothing public takes it back
            )


@contextmanager
def checkpointed(model: nn.Module, kind: str) -> Iterator[None]:
    """Inside, blocks keep less for the backward pass and run again in it; "none": as the model is.

    "full" keeps each block's input alone. Raises ValueError for a model without
    `gradient_checkpointing`.
    """
    if kind == "none":
        yield
        return
    if not hasattr(model, "gradient_checkpointing"):
        raise ValueError(
            f"activation_checkpointing is {kind!r}, but {type(model).__name__} has no attribute "
            "gradient_checkpointing to set; use 'none'"
        )
    before, model.gradient_checkpointing = model.gradient_checkpointing, True
    try:
        yield
    finally:
        model.gradient_checkpointing = before


def _parts(model: nn.Module) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for block in (module for module in model.modules() if isinstance(module, Block)):
        dense = isinstance(block.mlp, MLP)
        parts += [block] if dense else [block.self_attn, block.mlp.shared_expert]
    return parts or [model]


def uncompiled(on: bool):
    """A context for evaluation and sampling: their many shapes would be compiled one by one."""
    return torch.compiler.set_stance("force_eager") if on else nullcontext()
