"""The vocabulary's head and its cross-entropy as one operation, some rows at a time.

The gradient of a row's loss with respect to its logits is softmax - one-hot: known as soon as the
logits are. So each chunk of logits turns into its gradient on the spot and is dropped, and what is
kept for the backward pass is as small as the inputs. With 151,936 tokens the logits are by far the
largest tensor of a training step; here they never exist as a whole.

Shapes: M positions with a target, D hidden, V vocabulary.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlib.c_build import compiled

_LANES = 16  # of the widest registers
_ROWS, _ELEMENTS = 256, 1 << 21  # a chunk: at least so many rows, and about so many logits
_COLUMNS = 1 << 13  # of the vocabulary at a time in the weight's gradient


def linear_cross_entropy(
    x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log softmax(x W^T)[target] in fp32, and how many targets were likeliest.

    The products take the dtype of x and W, or autocast's; softmax and sums are fp32. Same value and
    gradients as `F.cross_entropy(x @ W.T, targets, reduction="sum")`, without a target that is
    ignored: leave such rows out. Of equal largest logits the first counts as likeliest. Raises
    ValueError when targets are not M whole numbers and, on a CPU, IndexError for one that is no
    row of W.
    """
    check_targets(x_MD, weight_VD, targets_M)
    kind = x_MD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if torch.is_grad_enabled() and (x_MD.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(x_MD, weight_VD, targets_M, dtype)
    loss, likeliest = _zeros(x_MD)
    with torch.autocast(kind, enabled=False):
        weight_VD = weight_VD.to(dtype or weight_VD.dtype)
        for x_RD, targets_R in _chunks(x_MD, targets_M, weight_VD):
            logits_RV = F.linear(x_RD.to(dtype or x_RD.dtype), weight_VD)
            loss_R, likeliest_R = _loss_and_gradient(logits_RV, targets_R)
            loss, likeliest = loss + loss_R.sum(), likeliest + likeliest_R.sum()
    return loss, likeliest


class _LinearCrossEntropy(torch.autograd.Function):
    """Casts by itself: autocast would keep its copy of the weight, without a gradient, for others.

    dtype: of the products, None for that of x and W.
    """

    @staticmethod
    def forward(ctx, x_MD, weight_VD, targets_M, dtype):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        loss, likeliest = _zeros(x_MD)
        grad_x_MD = torch.empty_like(x_MD) if needs_x else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        first = 0
        with torch.autocast(x_MD.device.type, enabled=False):
            cast_VD = weight_VD.to(dtype or weight_VD.dtype)
            for x_RD, targets_R in _chunks(x_MD, targets_M, weight_VD):
                x_RD = x_RD.to(dtype or x_RD.dtype)
                grad_RV = F.linear(x_RD, cast_VD)
                loss_R, likeliest_R = _loss_and_gradient(grad_RV, targets_R)
                loss, likeliest = loss + loss_R.sum(), likeliest + likeliest_R.sum()
                if needs_x:
                    grad_x_MD[first : first + len(x_RD)] = grad_RV @ cast_VD
                if needs_weight:
                    add_product(grad_weight_VD, grad_RV, x_RD)
                first += len(x_RD)
        if needs_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_x_MD, grad_weight_VD)
        ctx.mark_non_differentiable(likeliest)
        return loss, likeliest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_x_MD, grad_weight_VD = ctx.saved_tensors
        # loss.backward() asks for the gradient as it is: no second one as large as the weight.
        if grad_loss.device.type == "cpu" and grad_loss == 1:  # a GPU would have to wait
            return grad_x_MD, grad_weight_VD, None, None
        return (
            grad_x_MD if grad_x_MD is None else grad_x_MD * grad_loss,
            grad_weight_VD if grad_weight_VD is None else grad_weight_VD * grad_loss,
            None,
            None,
        )


def check_targets(x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> None:
    """Raise unless there is one target a row and, on a CPU, each is a row of W."""
    M, V = len(x_MD), len(weight_VD)
    if targets_M.dtype != torch.long or targets_M.shape != (M,):
        raise ValueError(
            f"targets must be {M} int64 numbers, one for each row of x; got "
            f"{tuple(targets_M.shape)} of {targets_M.dtype}"
        )
    if targets_M.device.type == "cpu" and M:  # a GPU would have to wait for the answer
        low, high = targets_M.aminmax()
        if low < 0 or high >= V:
            odd = int(low) if low < 0 else int(high)
            raise IndexError(
                f"target {odd} is outside 0 to {V - 1}, the rows of the weight; leave rows without "
                "a target out"
            )


def add_product(sum_VD: Tensor, grad_RV: Tensor, x_RD: Tensor) -> None:
    """sum += grad^T x, in parts: the whole product would be as large as the weight."""
    for first in range(0, len(sum_VD), _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        sum_VD[columns] += grad_RV[:, columns].t() @ x_RD


def _zeros(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    return x_MD.new_zeros((), dtype=torch.float32), x_MD.new_zeros((), dtype=torch.long)


def chunk_rows(weight_VD: Tensor) -> int:
    """How many rows' logits exist at a time; a GPU needs more of them to be busy."""
    least = _ROWS if weight_VD.device.type == "cpu" else 2 * _ROWS
    return max(least, _ELEMENTS // len(weight_VD))


def _chunks(x_MD, targets_M, weight_VD):
    rows = chunk_rows(weight_VD)
    return zip(x_MD.split(rows), targets_M.split(rows))


def _loss_and_gradient(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss, and 1 where its target is likeliest; logits become their gradients."""
    if logits_RV.device.type == "cpu" and logits_RV.dtype in _IN_C and (run := _compiled()):
        return _in_c(run, logits_RV, targets_R)
    scores_RV = logits_RV.float()
    rows_R = torch.arange(len(targets_R), device=targets_R.device)
    top_R, first_R = scores_RV.max(-1)
    picked_R = scores_RV[rows_R, targets_R]
    mass_RV = (scores_RV - top_R[:, None]).exp_()
    sum_R = mass_RV.sum(-1)
    mass_RV /= sum_R[:, None]
    mass_RV[rows_R, targets_R] -= 1
    logits_RV.copy_(mass_RV)
    return sum_R.log() + (top_R - picked_R), (first_R == targets_R).long()


_IN_C = (torch.float32, torch.bfloat16)


@functools.cache
def _compiled():
    library = compiled(Path(__file__).with_suffix(".c"))
    return library and library.cross_entropy


def _in_c(run, logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    (R, V), threads = logits_RV.shape, torch.get_num_threads()
    targets_R = targets_R.contiguous()  # under a name: it must outlive the call
    loss_R, likeliest_R = torch.empty(R), torch.empty(R, dtype=torch.long)
    room = torch.empty(threads, V + _LANES)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    run(
        pointer(logits_RV.data_ptr()), number(logits_RV.dtype == torch.bfloat16), number(R),
        number(V), pointer(targets_R.data_ptr()), pointer(loss_R.data_ptr()),
        pointer(likeliest_R.data_ptr()), pointer(room.data_ptr()), number(threads),
    )  # fmt: skip
    return loss_R, likeliest_R
