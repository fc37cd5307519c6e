"""An exponential moving average of the weights: what many steps agree on, with their noise out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- d average + (1 - d) weights after each step, in fp32.

    d is `decay`, but no more than (1 + n) / (10 + n) at update n: the first weights, which are
    random, do not stay in the average for long. weights: name -> tensor, of the parameters that are
    trained; it begins as a copy of them. It costs 4 bytes a parameter.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in self._pairs(model):
            average.lerp_(parameter.float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights, for good."""
        for average, parameter in self._pairs(model):
            parameter.copy_(average)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside, and its own ones, bit for bit, after it."""
        own = [parameter.detach().clone() for _, parameter in self._pairs(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), value in zip(self._pairs(model), own, strict=True):
                    parameter.copy_(value)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        return [(average, parameters[name]) for name, average in self.weights.items()]
