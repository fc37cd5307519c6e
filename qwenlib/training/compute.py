"""How a model computes while it is trained: its blocks compiled or not."""

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


def _parts(model: nn.Module) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for block in (module for module in model.modules() if isinstance(module, Block)):
        dense = isinstance(block.mlp, MLP)
        parts += [block] if dense else [block.self_attn, block.mlp.shared_expert]
    return parts or [model]


def uncompiled(on: bool):
    """A context for evaluation and sampling: their many shapes would be compiled one by one."""
    return torch.compiler.set_stance("force_eager") if on else nullcontext()
