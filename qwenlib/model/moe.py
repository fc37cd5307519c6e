"""Around the mixture of experts: reading the router, balancing it, and upcycling a dense model.

Shapes: N tokens, E experts, C chosen experts of a token, D hidden, U width of an expert.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlib.model.config import MoEConfig
from qwenlib.model.transformer import MLP, Experts, MoE, Qwen


@contextmanager
def recorded_router(model: Qwen) -> Iterator[list[Tensor]]:
    """Collect the router logits (N, E) of every MoE layer, in the order in which they run.

        with recorded_router(model) as logits:
            loss = cross_entropy(model(ids))
            loss = loss + coefficient * load_balancing_loss(logits, top_k)

    They carry gradients, and are those of the calling thread alone. Raises ValueError when the
    model has no MoE layer.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("this model has no mixture-of-experts layer to record")
    seen: list[Tensor] = []
    caller = threading.get_ident()

    def record(module, inputs, out_NE):
        if threading.get_ident() == caller:
            seen.append(out_NE)

    hooks = [layer.gate.register_forward_hook(record) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def load_balancing_loss(
    router_logits: Sequence[Tensor], top_k: int, mask_N: Tensor | None = None, pooled: bool = False
) -> Tensor:
    """Switch-style auxiliary loss E * sum_i f_i P_i (arXiv 2101.03961, eq. 4 to 6), a scalar.

    f_i: visits of expert i per token, P_i: mean probability of expert i. Even use gives top_k,
    the least that the loss can hold; mask_N leaves out padding. It is the mean over layers;
    `pooled` takes f and P over all layers at once, as transformers does, which lets one layer's
    excess hide another's.
    """
    shares = [_visits_and_probabilities(logits_NE, top_k, mask_N) for logits_NE in router_logits]
    if not shares:
        raise ValueError("no router logits: run the model inside recorded_router")
    f_LE, P_LE = (torch.stack(part) for part in zip(*shares))
    if pooled:
        f_LE, P_LE = f_LE.mean(0, keepdim=True), P_LE.mean(0, keepdim=True)
    return f_LE.shape[1] * (f_LE * P_LE).sum(1).mean()


@dataclass(frozen=True)
class RouterStatistics:
    """Of one layer. load_E: share of all visits, sums to 1; probability_E: mean router probability.

    imbalance: largest load times E (1 is even). entropy: mean entropy of a token's router, nats.
    kept: mean sum of the chosen gates, what of the routed output is left without renormalising.
    """

    load_E: Tensor
    probability_E: Tensor
    imbalance: float
    entropy: float
    kept: float


@torch.no_grad()
def router_statistics(
    logits_NE: Tensor, top_k: int, mask_N: Tensor | None = None
) -> RouterStatistics:
    """How evenly and how surely a layer's router chooses; mask_N leaves out padding."""
    if mask_N is not None:
        logits_NE = logits_NE[mask_N.bool()]
    visits_E, probability_E = _visits_and_probabilities(logits_NE, top_k, None)
    p_NE = logits_NE.float().softmax(-1)
    load_E = visits_E / top_k
    return RouterStatistics(
        load_E=load_E,
        probability_E=probability_E,
        imbalance=float(load_E.max() * load_E.numel()),
        entropy=float(torch.special.entr(p_NE).sum(-1).mean()),
        kept=float(p_NE.topk(top_k).values.sum(-1).mean()),
    )


def _visits_and_probabilities(logits_NE, top_k, mask_N) -> tuple[Tensor, Tensor]:
    p_NE = logits_NE.float().softmax(-1)
    chosen_NE = torch.zeros_like(p_NE).scatter(1, p_NE.topk(top_k).indices, 1.0)
    if mask_N is None:
        return chosen_NE.mean(0), p_NE.mean(0)
    weight_N1 = mask_N.to(p_NE.dtype).flatten()[:, None] / mask_N.sum()
    return (chosen_NE * weight_N1).sum(0), (p_NE * weight_N1).sum(0)


def expert_units(experts: int, width: int, dense_width: int, generator: torch.Generator) -> Tensor:
    """Which unit of the dense FFN each unit of each expert copies, (E, U).

    ceil(E U / dense_width) copies of the FFN, each shuffled, laid end to end, cut into experts;
    what is left over is dropped (Qwen2 report §2.2.2). So an expert never holds a unit twice
    unless it straddles two copies.
    """
    copies = math.ceil(experts * width / dense_width)
    units = [torch.randperm(dense_width, generator=generator) for _ in range(copies)]
    return torch.cat(units)[: experts * width].view(experts, width)


@torch.no_grad()
def upcycle(dense: Qwen, moe: MoEConfig, seed: int, redraw: float = 0.5) -> Qwen:
    """A mixture of experts that begins as a trained dense model (Qwen2 report §2.2.2).

    Each routed expert takes units of the dense FFN (`expert_units`), then a random share `redraw`
    of the entries of each of its matrices is drawn anew from Normal(0, initializer_range). The
    reports do not say how the rest begins: here the shared expert takes units in the same way,
    none redrawn (an exact copy when it is as wide as the FFN), and both gates are
    Normal(0, initializer_range). All other weights are copied. Raises ValueError when `dense` has
    experts already or redraw is not a share.
    """
    if dense.config.moe is not None:
        raise ValueError("this model has experts already; upcycling starts from a dense one")
    if not 0 <= redraw <= 1:
        raise ValueError(f"redraw must be a share between 0 and 1, got {redraw}")
    parameter = next(dense.parameters())
    # Apart, so that the share redrawn does not change which units an expert takes.
    choice, fresh = (torch.Generator().manual_seed(seed + i) for i in range(2))
    # On the CPU, where the draws are: the same seed then means the same model on every device.
    model = Qwen(dense.config.replace(moe=moe)).initialise(seed).to(parameter.dtype)
    old, new = dense.state_dict(), model.state_dict()
    for name in new.keys() & old.keys():
        new[name].copy_(old[name])
    for target, source in zip(model.model.layers, dense.model.layers):
        if isinstance(target.mlp, MoE):
            _take_units(target.mlp.experts, source.mlp, choice)
            _redraw(target.mlp.experts, redraw, dense.config.initializer_range, fresh)
            _take_shared_units(target.mlp.shared_expert, source.mlp, choice)
    return model.to(parameter.device).train(dense.training)


def _take_units(target: Experts, source: MLP, generator) -> None:
    gate, up, down = _on_cpu(source)
    units_EU = expert_units(*target.down_proj.shape[::2], gate.shape[0], generator)
    for expert, units_U in enumerate(units_EU):
        target.gate_up_proj[expert] = torch.cat((gate[units_U], up[units_U]))
        target.down_proj[expert] = down[:, units_U]


def _take_shared_units(target: MLP, source: MLP, generator) -> None:
    gate, up, down = _on_cpu(source)
    width = target.gate_proj.weight.shape[0]
    units_U = torch.arange(width)
    if width != len(gate):
        units_U = expert_units(1, width, len(gate), generator)[0]
    target.gate_proj.weight.copy_(gate[units_U])
    target.up_proj.weight.copy_(up[units_U])
    target.down_proj.weight.copy_(down[:, units_U])


def _redraw(experts: Experts, share: float, spread: float, generator) -> None:
    """Of every expert's matrices exactly round(share * entries) entries, chosen at random."""
    for weight in (*experts.gate_up_proj, *experts.down_proj):
        count = round(share * weight.numel())
        chosen = torch.randperm(weight.numel(), generator=generator)[:count]
        fresh = spread * torch.randn(count, generator=generator)
        weight.view(-1)[chosen] = fresh.to(weight.dtype)


def _on_cpu(mlp: MLP) -> list[Tensor]:
    return [part.weight.cpu() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
