"""Each target's log-probability and its distribution's entropy, without a matrix of logits.

Preference losses and policy gradients weigh the tokens, so their gradient is unknown until the
backward pass. Kept until then are two numbers a row, the largest scaled logit and the log of the
mass around it; the logits are computed again, some rows at a time.

With z = x W^T / temperature, p = softmax(z), log-probability l = log p[target] and entropy H:

    dl/dz = one-hot - p,    dH/dz = -p (log p + H)

Shapes: M rows, D hidden, V vocabulary, R rows of a chunk.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlib.kernels.cross_entropy import add_product, check_targets, chunk_rows


def linear_logprobs(
    x_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(x W^T / temperature)[target] of each row, and the rows' entropies in nats.

    Both (M,) in fp32 (fp64 from fp64), with gradients to x and W; the entropies are None unless
    asked for. The products take the dtype of x and W, or autocast's; softmax and sums are fp32.
    There is no target that is ignored: leave such rows out. Raises ValueError for a temperature
    that is not positive or targets that are not M whole numbers and, on a CPU, IndexError for a
    target that is no row of W.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_targets(x_MD, weight_VD, targets_M)
    kind = x_MD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    logp_M, entropy_M = _LinearLogprobs.apply(
        x_MD, weight_VD, targets_M, temperature, with_entropy, dtype
    )
    return logp_M, entropy_M if with_entropy else None


class _LinearLogprobs(torch.autograd.Function):
    """Casts by itself, as `_LinearCrossEntropy` does and for its reason.

    dtype: of the products, None for that of x and W.
    """

    @staticmethod
    def forward(ctx, x_MD, weight_VD, targets_M, temperature, with_entropy, dtype):
        top_M = x_MD.new_empty(len(x_MD), dtype=_wide(x_MD.dtype))
        logp_M, log_mass_M = torch.empty_like(top_M), torch.empty_like(top_M)
        entropy_M = torch.empty_like(top_M) if with_entropy else None
        with torch.autocast(x_MD.device.type, enabled=False):
            cast_VD = weight_VD.to(dtype or weight_VD.dtype)
            for part, x_RD in _chunks(x_MD, weight_VD):
                z_RV = _scaled_logits(x_RD.to(dtype or x_RD.dtype), cast_VD, temperature)
                top_M[part] = z_RV.amax(-1)
                z_RV -= top_M[part, None]  # keeps the digits of large logits
                logp_M[part] = z_RV.gather(1, targets_M[part, None])[:, 0]
                mass_RV = z_RV.exp() if with_entropy else z_RV.exp_()
                mass_R = mass_RV.sum(-1)
                log_mass_M[part] = mass_R.log()
                if with_entropy:
                    mean_R = mass_RV.mul_(_finite(z_RV)).sum(-1) / mass_R
                    entropy_M[part] = log_mass_M[part] - mean_R
        logp_M -= log_mass_M
        ctx.save_for_backward(x_MD, weight_VD, targets_M, top_M, log_mass_M, entropy_M)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.set_materialize_grads(False)
        return logp_M, entropy_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp_M, grad_entropy_M):
        x_MD, weight_VD, targets_M, top_M, log_mass_M, entropy_M = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if grad_logp_M is None:
            grad_logp_M = torch.zeros_like(top_M)
        grad_x_MD = torch.empty_like(x_MD) if needs_x else None
        grad_weight_VD = None
        if needs_weight:
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype))
        with torch.autocast(x_MD.device.type, enabled=False):
            cast_VD = weight_VD.to(ctx.dtype or weight_VD.dtype)
            for part, x_RD in _chunks(x_MD, weight_VD):
                x_RD, grad_R1 = x_RD.to(ctx.dtype or x_RD.dtype), grad_logp_M[part, None]
                z_RV = _scaled_logits(x_RD, cast_VD, ctx.temperature)
                z_RV -= top_M[part, None]
                z_RV -= log_mass_M[part, None]
                if grad_entropy_M is None:
                    grad_RV = z_RV.exp_().mul_(-grad_R1)
                else:
                    p_RV, weight_R1 = z_RV.exp(), grad_entropy_M[part, None]
                    inner_RV = _finite(z_RV).add_(entropy_M[part, None]).mul_(weight_R1)
                    grad_RV = inner_RV.add_(grad_R1).mul_(p_RV).neg_()
                    del p_RV
                grad_RV.scatter_add_(1, targets_M[part, None], grad_R1)
                grad_RV = grad_RV.div_(ctx.temperature).to(cast_VD.dtype)
                if needs_x:
                    grad_x_MD[part] = (grad_RV @ cast_VD).to(grad_x_MD.dtype)
                if needs_weight:
                    add_product(grad_weight_VD, grad_RV, x_RD)
        if needs_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_x_MD, grad_weight_VD, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(x_MD: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = chunk_rows(weight_VD)
    for first in range(0, len(x_MD), rows):
        part = slice(first, first + rows)
        yield part, x_MD[part]


def _scaled_logits(x_RD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_RV = F.linear(x_RD, weight_VD)
    return logits_RV.to(_wide(logits_RV.dtype)).div_(temperature)


def _finite(log_p_RV: Tensor) -> Tensor:
    """In place: where a probability is 0, its product with its logarithm must be 0 and not NaN."""
    return log_p_RV.clamp_(min=-1000)  # below -746 no dtype has a probability
