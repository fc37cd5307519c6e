"""What pays on a CPU: products of few rows with a large matrix.

Shapes as in `reference.py`.
"""

import torch
from torch import Tensor

from qwenlib.kernels import reference

# Above so many rows, or below so many weights, the ordinary product is as fast or faster.
_MAX_ROWS, _MIN_WEIGHTS = 4, 1 << 17


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`reference.linear`, at the speed of the memory for up to four rows in fp32.

    MKL multiplies one row by a matrix on one thread, at a third of the bandwidth that two threads
    have. As W x^T with two or more columns the same product is split over the rows of W.
    """
    rows = x_ND.shape[0]
    few = rows <= _MAX_ROWS and weight_FD.numel() >= _MIN_WEIGHTS
    if not few or x_ND.device.type != "cpu" or x_ND.dtype != torch.float32:
        return reference.linear(x_ND, weight_FD, bias_F)
    if rows == 1:
        x_ND = x_ND.expand(2, -1).contiguous()  # a single column would go the slow way again
    y_FN = weight_FD @ x_ND.t()
    if bias_F is not None:
        y_FN += bias_F[:, None]
    return y_FN[:, :rows].t().contiguous()
