"""Group relative policy optimisation, the report's online RL (§4.3; arXiv 2402.03300, eq. 3).

Shapes: N completions = queries * group_size, the copies of one query side by side; T completion
tokens; Q queries.
"""

import torch
from torch import Tensor


def completion_mask(ids_NT: Tensor, eos_ids: int | list[int] | tuple[int, ...]) -> Tensor:
    """True up to and *with* the first stop token; all True in a completion that has none.

    Positions decide, not ids: padding that equals the stop token stays out.
    """
    eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
    is_eos_NT = torch.isin(ids_NT, torch.tensor(eos_ids, device=ids_NT.device))
    return is_eos_NT.long().cumsum(-1) - is_eos_NT.long() == 0


def group_variance(rewards_N: Tensor, group_size: int) -> Tensor:
    """Unbiased variance of each query's rewards (Q,), 0 for a group of one.

    The report trains on the queries in descending order of it (§4.3).
    """
    rewards_QG = _groups(rewards_N, group_size)
    return torch.zeros_like(rewards_QG[:, 0]) if group_size == 1 else rewards_QG.var(-1)


def group_advantages(
    rewards_N: Tensor,
    group_size: int,
    scale: str | None = None,
    estimator: str = "grpo",
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each completion over its own group, in fp32.

    estimator "grpo" subtracts the group's mean, "rloo" the mean of the *other* members, which is
    G/(G-1) times as far. scale "std" (GRPO's default) divides by the group's standard deviation
    (ddof = 1) + eps, "batch" by the whole batch's, "none" (RLOO's default, and Dr. GRPO) by
    nothing. A NaN reward means "could not be scored": it leaves the means and gets 0. A group of
    one, and a group of equal rewards, get exactly 0.

    One success in eight: +2.474 and seven times -0.353; four in eight: ±0.935.
    """
    scale = scale or {"grpo": "std", "rloo": "none"}.get(estimator)
    if estimator not in ("grpo", "rloo") or scale not in ("std", "batch", "none"):
        raise ValueError(f"unknown estimator {estimator!r} or scale {scale!r}")
    rewards_QG = _groups(rewards_N, group_size)
    scored_QG = ~rewards_QG.isnan()
    rewards_QG = torch.where(scored_QG, rewards_QG, 0.0)
    n_Q1 = scored_QG.sum(-1, keepdim=True)
    mean_Q1 = rewards_QG.sum(-1, keepdim=True) / n_Q1.clamp(min=1)
    centred_QG = torch.where(scored_QG, rewards_QG - mean_Q1, 0.0)
    advantages_QG = centred_QG
    if estimator == "rloo":
        advantages_QG = advantages_QG * n_Q1 / (n_Q1 - 1).clamp(min=1)
    if scale == "std":
        variance_Q1 = centred_QG.square().sum(-1, keepdim=True) / (n_Q1 - 1).clamp(min=1)
        advantages_QG = advantages_QG / (variance_Q1.sqrt() + eps)
    elif scale == "batch" and scored_QG.sum() > 1:
        advantages_QG = advantages_QG / (rewards_QG[scored_QG].std() + eps)
    # The mean of equal numbers may miss them by an ulp; dividing that by eps must teach nothing.
    low_Q1 = torch.where(scored_QG, rewards_QG, torch.inf).amin(-1, keepdim=True)
    high_Q1 = torch.where(scored_QG, rewards_QG, -torch.inf).amax(-1, keepdim=True)
    return torch.where(high_Q1 > low_Q1, advantages_QG, 0.0).reshape(-1)


def grpo_loss(
    token_logp_NT: Tensor,
    old_logp_NT: Tensor | None,
    advantages_N: Tensor,
    mask_NT: Tensor,
    ref_logp_NT: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: str = "none",
    kl_coef: float = 0.0,
    aggregate: str = "sequence",
    denominator: float | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Clipped policy loss summed over completions, its count, and statistics.

        ρ = exp(log π - log π_old),   ℓ_t = -min(ρ A, clip(ρ, 1-ε_low, 1+ε_high) A) + kl_coef KL_t

    The loop divides the sum by the count over all micro-batches and ranks. aggregate: "sequence"
    Σ_i (1/T_i) Σ_t ℓ over N (GRPO); "token" Σ ℓ over Σ T_i (DAPO); "constant" Σ ℓ / denominator
    over N, denominator being the longest completion allowed (Dr. GRPO). old_logp None: on policy.

    kl, with d = log π_ref - log π: "k1" -d; "k2" d²/2, whose gradient is that of KL(π‖ref) on
    policy; "k3" e^d - d - 1, whose gradient is that of KL(ref‖π); "k3+" the value of k3 with the
    gradient of k2. As a loss term k1 has an expected gradient of zero.

    Hand-worked: ρ = 1.5, A = 1 clips to -1.2 without gradient; A = -1 gives +1.5 with gradient.
    """
    if kl not in ("none", "k1", "k2", "k3", "k3+"):
        raise ValueError(f"unknown kl {kl!r}; choose none, k1, k2, k3 or k3+")
    if kl != "none" and ref_logp_NT is None:
        raise ValueError(f"kl={kl!r} needs ref_logp_NT, the reference model's log-probs")
    if (aggregate == "constant") != (denominator is not None):
        raise ValueError("denominator belongs to aggregate='constant', and only to it")
    mask_NT = mask_NT.bool()
    logp_NT = _masked(token_logp_NT, mask_NT)
    old_NT = logp_NT.detach() if old_logp_NT is None else _masked(old_logp_NT, mask_NT).detach()
    A_N1 = advantages_N.detach().float().unsqueeze(-1)
    ratio_NT = (logp_NT - old_NT).clamp(-20, 20).exp()
    clipped_NT = ratio_NT.clamp(1 - clip_low, 1 + clip_high)
    loss_NT = -torch.minimum(ratio_NT * A_N1, clipped_NT * A_N1)
    tokens = mask_NT.sum()
    with torch.no_grad():
        stats = {
            "ratio": _token_mean(ratio_NT, mask_NT),
            "clip/low": _token_mean((ratio_NT < 1 - clip_low) & (A_N1 < 0), mask_NT),
            "clip/high": _token_mean((ratio_NT > 1 + clip_high) & (A_N1 > 0), mask_NT),
            "completion_length": tokens / len(mask_NT),
        }
    if kl != "none":
        d_NT = _masked(ref_logp_NT, mask_NT).detach() - logp_NT
        k2_NT, k3_NT = d_NT.square() / 2, d_NT.clamp(-20, 20).exp() - d_NT - 1
        k3_plus_NT = k2_NT + (k3_NT - k2_NT).detach()
        loss_NT = loss_NT + kl_coef * {"k1": -d_NT, "k2": k2_NT, "k3": k3_NT, "k3+": k3_plus_NT}[kl]
        stats["kl"] = _token_mean(k3_NT.detach(), mask_NT)
    loss_N = torch.where(mask_NT, loss_NT, 0.0).sum(-1)
    if aggregate == "token":
        return loss_N.sum(), tokens, stats
    count = torch.tensor(len(loss_N), device=loss_N.device)
    if aggregate == "sequence":
        return (loss_N / mask_NT.sum(-1).clamp(min=1)).sum(), count, stats
    if aggregate == "constant":
        return loss_N.sum() / denominator, count, stats
    raise ValueError(f"unknown aggregate {aggregate!r}; choose sequence, token or constant")


def _groups(rewards_N: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or rewards_N.dim() != 1 or len(rewards_N) % group_size:
        raise ValueError(
            f"{tuple(rewards_N.shape)} rewards do not split into groups of {group_size}"
        )
    return rewards_N.float().reshape(-1, group_size)


def _masked(x_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Zero outside the mask before any arithmetic: 0 * NaN and 0 * inf would be NaN."""
    return torch.where(mask_NT, x_NT.float(), 0.0)


def _token_mean(x_NT: Tensor, mask_NT: Tensor) -> Tensor:
    return torch.where(mask_NT, x_NT.float(), 0.0).sum() / mask_NT.sum().clamp(min=1)
