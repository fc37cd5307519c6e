"""Online Merging Optimizer (arXiv 2405.17931), which the report's DPO trains with (§4.2).

Preference training forgets what SFT taught. Each optimiser step therefore merges two directions:
δ, the step AdamW would take, and τ = θ_SFT - θ_base, the task vector that made the SFT model:

    θ ← θ + (1-α) F(δ) ⊕ α F(τ)

OnDARE: F keeps each entry with probability p, ⊕ adds. OnTIES: F keeps the share p of largest
magnitude, ⊕ adds where signs agree and keeps the larger of the two where they do not.

The report names the optimiser and gives neither α, p nor the variant. The authors' code and paper
differ, and we choose: DARE rescales survivors by 1/p (code; the paper says it does not), draws
F(τ) anew each step (the paper's algorithm; the code draws once), and TIES compares the weighted
terms (paper; the code compares unweighted ones, so that τ, far larger than δ, wins nearly always).
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qwenlib.model import Qwen
from qwenlib.model.checkpoint import read_config


def merge_ondare(
    delta: Tensor,
    tau: Tensor,
    alpha: float,
    p: float,
    generator: torch.Generator | None = None,
    rescale: bool = True,
) -> Tensor:
    """(1-α) F(δ) + α F(τ), where F keeps an entry with probability p and divides it by p.

    The division makes E[F(x)] = x; rescale=False leaves it out. Masks of δ and τ are independent.
    """
    kept_delta = _drop(delta, p, generator, rescale)
    kept_tau = _drop(tau, p, generator, rescale)
    return (1 - alpha) * kept_delta + alpha * kept_tau


def merge_onties(
    delta: Tensor, tau: Tensor, alpha: float, p: float, generator: torch.Generator | None = None
) -> Tensor:
    """(1-α) F(δ) ⊕ α F(τ), where F keeps the share p of largest magnitude (at least one entry).

    Four entries, α = ½, p = ¾: δ = (4, -3, 2, 1) keeps 4, -3, 2; τ = (2, 5, -1, -6) keeps 2, 5, -6.
    Halved: (2, -1.5, 1, 0) ⊕ (1, 2.5, 0, -3) = (3, 2.5, 1, -3). The generator is not used.
    """
    ours = (1 - alpha) * _trim(delta, p)
    theirs = alpha * _trim(tau, p)
    opposed = ours.sign() * theirs.sign() < 0  # of signs: a product of small values underflows
    larger = torch.where(ours.abs() >= theirs.abs(), ours, theirs)
    return torch.where(opposed, larger, ours + theirs)


MERGES = {"ondare": merge_ondare, "onties": merge_onties}


def _drop(x: Tensor, p: float, generator: torch.Generator | None, rescale: bool) -> Tensor:
    keep = torch.rand(x.shape, generator=generator, device=x.device) < p
    return torch.where(keep, x / p if rescale else x, 0.0)


def _trim(x: Tensor, p: float) -> Tensor:
    keep = max(1, int(p * x.numel()))
    if keep >= x.numel():
        return x
    flat = x.flatten()
    top = flat.abs().topk(keep).indices
    return torch.zeros_like(flat).scatter(0, top, flat[top]).view_as(x)


def check_base(tuned: str | Path, base: str | Path) -> None:
    """Raise ValueError unless two model folders hold tensors of the same names and shapes.

    Only the configurations are read: a wrong base is named before anything is sampled or trained.
    """
    with torch.device("meta"):
        ours, theirs = (Qwen(read_config(folder)).state_dict() for folder in (tuned, base))
    for name in {**ours, **theirs}:
        here, there = (
            f"of shape {tuple(s[name].shape)}" if name in s else "missing" for s in (ours, theirs)
        )
        if here != there:
            raise ValueError(
                f"{base} is not the model that {tuned} was tuned from: {name} is {there} there and "
                f"{here} in {tuned}; give the one that SFT began from (chapter 10: merge_base)"
            )


def task_vectors(
    model: nn.Module, tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """τ = tuned - base for each trainable parameter of the model, in fp32 on its device.

    tuned and base are state dicts of the SFT model and of the model before SFT; a training run
    that resumes passes the same two. Raises KeyError or ValueError naming the parameter.
    """
    out = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for what, state in (("tuned", tuned), ("base", base)):
            if name not in state:
                raise KeyError(f"the {what} model has no parameter {name!r}")
            if state[name].shape != parameter.shape:
                raise ValueError(
                    f"{name}: the {what} model has shape {tuple(state[name].shape)}, "
                    f"the model in training {tuple(parameter.shape)}"
                )
        difference = tuned[name].detach().float() - base[name].detach().float()
        out[parameter] = difference.to(parameter.device)
    return out


class OnlineMergingAdamW(torch.optim.Optimizer):
    """AdamW whose step δ is merged with the SFT task vector before it is applied.

    Args:
        params: parameters or groups, all fp32: α τ is some 1e-9 and vanishes in a bf16 weight.
        tau: `task_vectors(...)`; not part of `state_dict`, so a resumed run passes it again.
        alpha, p: weight of τ, and share of entries kept. The authors' script: 1e-7 and 0.01.
        variant: "ondare" or "onties". rescale: DARE's division by p.
        every: merge at each k-th step; the k-1 steps between are plain AdamW, and the merge takes
            back their sum and applies it merged (one more copy of the weights for k > 1).
        seed: a mask depends on (seed, parameter index, step) only, not on the global RNG.

    δ = -lr/(1-β1^t) · m / (√v / √(1-β2^t) + ε), as torch.optim.AdamW places ε (the authors' code
    adds it to √v before the correction); α = 0, p = 1 is that optimiser bit for bit on a CPU.
    Weight decay acts on θ directly and is not merged. α τ is not scaled by the learning rate, as
    in the paper, except that lr = 0 moves nothing.
    Raises TypeError for a parameter that is not fp32, ValueError for bad numbers, KeyError for a
    parameter without task vector.
    """

    def __init__(
        self,
        params: Iterable,
        tau: Mapping[nn.Parameter, Tensor],
        lr: float = 7e-7,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 1e-7,
        p: float = 0.01,
        variant: str = "ondare",
        rescale: bool = True,
        every: int = 1,
        seed: int = 0,
    ):
        if not 0 <= alpha <= 1 or not 0 < p <= 1 or every < 1:
            raise ValueError(f"need 0 <= alpha <= 1, 0 < p <= 1, every >= 1: {alpha}, {p}, {every}")
        if variant not in MERGES:
            raise ValueError(f"unknown variant {variant!r}; choose ondare or onties")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.alpha, self.p, self.variant, self.rescale = alpha, p, variant, rescale
        self.every, self.seed = every, seed
        self._tau = dict(tau)
        for index, parameter in enumerate(self._parameters()):
            if parameter.dtype != torch.float32:
                raise TypeError(
                    f"parameter {index} is {parameter.dtype}; online merging needs fp32 master "
                    "weights: load the model with dtype=torch.float32 and use autocast"
                )
            if parameter not in self._tau:
                raise KeyError(f"parameter {index} {tuple(parameter.shape)} has no task vector")
            if self._tau[parameter].shape != parameter.shape:
                raise ValueError(f"the task vector of parameter {index} has another shape")

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def merge(self, delta: Tensor, tau: Tensor, index: int, step: int) -> Tensor:
        """The merged movement of parameter `index` at `step`."""
        if self.variant == "onties":
            return merge_onties(delta, tau, self.alpha, self.p)
        digest = hashlib.sha256(f"{self.seed}/{index}/{step}".encode()).digest()
        generator = torch.Generator(delta.device).manual_seed(int.from_bytes(digest[:7], "big"))
        return merge_ondare(delta, tau, self.alpha, self.p, generator, self.rescale)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(parameter, group, index)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict, index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if self.every > 1:
                state["anchor"] = parameter.detach().clone()
        state["step"] += 1
        step, lr, decay = int(state["step"]), group["lr"], 1 - group["lr"] * group["weight_decay"]
        delta = adam_delta(parameter.grad, state, lr, group["betas"], group["eps"])
        if lr == 0:
            return
        parameter.mul_(decay)
        tau = self._tau[parameter].to(parameter)
        if self.every == 1:
            parameter.add_(self.merge(delta, tau, index, step))
            return
        anchor = state["anchor"].mul_(decay)
        parameter.add_(delta)
        if step % self.every == 0:
            anchor.add_(self.merge(parameter - anchor, tau, index, step))
            parameter.copy_(anchor)


def adam_delta(
    gradient: Tensor, state: dict, lr: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update both moments in place and return AdamW's movement, decay excluded (arXiv 1412.6980).

    The order of operations is torch.optim.adamw's, so that the bits agree too.
    """
    step, (beta1, beta2) = state["step"].item(), betas
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    return torch.zeros_like(gradient).addcdiv_(
        state["exp_avg"], denominator, value=-lr / (1 - beta1**step)
    )
