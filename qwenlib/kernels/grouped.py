"""Experts by grouped matrix products: one product over tokens sorted by their expert.

Shapes as in `reference.py`; M = N * C visits of a token to an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlib.kernels import reference


def usable(x_ND: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor) -> bool:
    """Whether torch's grouped product takes these operands: rows must start at 16-byte steps."""
    if not hasattr(F, "grouped_mm"):
        return False
    widths = (x_ND.shape[-1], gate_up_EXD.shape[1], down_EDF.shape[-1])
    return all(width * x_ND.element_size() % 16 == 0 for width in widths)


def expert_ffn(
    x_ND: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, experts_NC: Tensor, gates_NC: Tensor
) -> Tensor:
    """`reference.expert_ffn` without a loop and without asking the device how many go where."""
    if not usable(x_ND, gate_up_EXD, down_EDF):
        return reference.expert_ffn(x_ND, gate_up_EXD, down_EDF, experts_NC, gates_NC)
    N, C = experts_NC.shape
    order_M = experts_NC.flatten().argsort(stable=True)
    # Where each expert's visits end. A comparison, because bincount would wait for the device.
    numbers_E = torch.arange(gate_up_EXD.shape[0], device=x_ND.device)
    ends_E = (experts_NC.flatten() <= numbers_E[:, None]).sum(1, dtype=torch.int32)
    x_MD = x_ND[order_M // C]
    gate, up = F.grouped_mm(x_MD, gate_up_EXD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_MD = F.grouped_mm(reference.swiglu(gate, up), down_EDF.transpose(1, 2), offs=ends_E)
    # Back in token order the sum over C is a plain one: no atomics, the same bits every time.
    y_NCD = torch.empty_like(y_MD).index_copy(0, order_M, y_MD).unflatten(0, (N, C))
    return (y_NCD * gates_NC[..., None]).sum(1)
