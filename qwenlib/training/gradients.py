"""The gradients of a step's micro-batches: one after the other, or side by side on CPU threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwenlib.training.sharding import one_sum


class Gradients:
    """Sums losses, counts and gradients over micro-batches.

    Called with (model, micro-batches, loss_fn), where loss_fn gives (loss_sum, count, stats), it
    adds the gradient of the sum of loss_sum to each parameter's `grad` and returns the sum of the
    losses, that of the counts, and of stats times counts. Each micro-batch is asked for
    once, when its turn comes. Then `losses` holds their mean losses and `shapes` their `row_shape`
    (rows, tokens a row), (0, 0) without one.

    On a CPU with several micro-batches, `workers` threads (0: as many as PyTorch has) take one each
    and share out the cores; so many micro-batches and their gradients lie in memory together. A
    model of a million parameters is made of operations too short for two cores at once; two
    operations on one core each lose nothing. The sum is taken in the order of the micro-batches:
    with one thread for each worker the result is that of a single thread, bit for bit.

    loss_fn must then keep nothing between calls and draw no random numbers, and the caller's own
    contexts of a thread (no_grad, hooks on saved tensors) do not reach it. In a process group
    micro-batches follow each other, because its hooks belong to a plain backward pass.
    """

    def __init__(self, parameters: Sequence[Tensor], autocast: str = "none", workers: int = 0):
        self.parameters, self.autocast = list(parameters), autocast
        self.device = self.parameters[0].device
        self.threads = torch.get_num_threads()
        alone = not (dist.is_available() and dist.is_initialized())
        side_by_side = self.device.type == "cpu" and alone
        self.workers = (workers or self.threads) if side_by_side else 1
        self.losses: list[float] = []
        self.shapes: list[tuple[int, int]] = []
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Gradients":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)  # for threads yet to come; ours never changed

    def __call__(
        self, model: nn.Module, micro_batches: Sequence[Any], loss_fn: Callable[..., tuple]
    ) -> tuple[float, float, dict[str, float]]:
        workers = min(self.workers, len(micro_batches))
        if workers > 1:
            results = self._side_by_side(model, micro_batches, loss_fn, workers)
        else:
            parts = one_sum(model, micro_batches)
            results = [self._in_place(model, batch, loss_fn) for batch in parts]
        total, count, sums, self.losses, self.shapes = 0.0, 0.0, {}, [], []
        for loss_sum, counted, stats, shape in results:  # a GPU is waited for here, not before
            loss, n = float(loss_sum), float(counted)
            self.shapes.append(shape)
            self.losses.append(loss / max(n, 1))
            total, count = total + loss, count + n
            for key, value in stats.items():
                sums[key] = sums.get(key, 0.0) + float(value) * n
        return total, count, sums

    def _loss(self, model, batch, loss_fn) -> tuple[Tensor, tuple]:
        # Without autocast's cache of cast weights, which all threads would share.
        half = self.autocast == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, half, cache_enabled=False):
            loss_sum, n, stats = loss_fn(model, batch)
        stats = {k: v.detach() if isinstance(v, Tensor) else v for k, v in stats.items()}
        shape = getattr(batch, "row_shape", (0, 0))
        return loss_sum, (loss_sum.detach(), n, stats, shape)

    def _in_place(self, model, batch, loss_fn) -> tuple:
        loss_sum, numbers = self._loss(model, batch, loss_fn)
        loss_sum.backward()
        return numbers

    def _side_by_side(self, model, micro_batches, loss_fn, workers) -> list[tuple]:
        self.pool = self.pool or ThreadPoolExecutor(self.workers)
        share = max(1, self.threads // workers)

        def one(batch) -> tuple:
            torch.set_num_threads(share)  # of this thread, and of threads that start later
            loss_sum, numbers = self._loss(model, batch, loss_fn)
            return torch.autograd.grad(loss_sum, self.parameters, allow_unused=True), numbers

        # All at once and not more than there are workers: their gradients lie in memory together.
        results = []
        for first in range(0, len(micro_batches), workers):
            for gradients, numbers in self.pool.map(one, micro_batches[first : first + workers]):
                results.append(numbers)
                for parameter, gradient in zip(self.parameters, gradients):
                    if gradient is not None:
                        old = parameter.grad
                        parameter.grad = gradient if old is None else old.add_(gradient)
        return results
