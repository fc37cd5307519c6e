"""What several processes must agree on; a process that is alone agrees with itself at no cost."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Processes of the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element by element, the sum of every rank's values: the same bits on each of them.

    All ranks must give as many, in one order. In fp64, so that counts stay exact.
    """
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of replicated parameters over ranks; sharded ones (DTensor) are already.

    Every rank must have gradients of the same parameters.
    """
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
