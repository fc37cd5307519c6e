"""Direct preference optimisation, the report's offline RL (§4.2; arXiv 2305.18290, eq. 7).

Shapes: B pairs. A log-probability here is that of a whole answer: the *sum* over its target tokens
(`sequence_logprobs(...)[0].sum(-1)`), prompt and padding excluded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over pairs, and the statistics users of TRL know.

        Δ = (log π(y_c) - log π_ref(y_c)) - (log π(y_r) - log π_ref(y_r))

    variant "sigmoid": -(1-ε) log σ(βΔ) - ε log σ(-βΔ), with ε = label_smoothing (cDPO);
    "robust": the same two terms, unbiased for labels flipped with probability ε (arXiv 2403.00409);
    "ipo": (Δ - 1/(2β))², for which the caller passes length-averaged log-probs (arXiv 2310.12036).
    The reference receives no gradient, whatever graph it comes from.

    Hand-worked: at the start π = π_ref, so Δ = 0, the loss is ln 2 = 0.693147 and its gradient on
    each policy_chosen is -β/(2B). With β = 0.1 and Δ = 2 the loss is ln(1 + e^-0.2) = 0.598139.

    Raises ValueError for a non-positive beta, an unknown variant, unequal shapes, or a
    label_smoothing outside [0, ½).
    """
    shapes = {
        tuple(x.shape)
        for x in (policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    }
    if len(shapes) != 1:
        raise ValueError(f"the four log-prob tensors differ in shape: {sorted(shapes)}")
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    # Sums over hundreds of tokens cancel here: bf16 would leave nothing of the difference.
    chosen_B = policy_chosen_B.float() - reference_chosen_B.detach().float()
    rejected_B = policy_rejected_B.float() - reference_rejected_B.detach().float()
    delta_B = chosen_B - rejected_B
    if variant == "ipo":
        loss_B = (delta_B - 1 / (2 * beta)).square()
    elif variant in ("sigmoid", "robust"):
        right_B, flipped_B = -F.logsigmoid(beta * delta_B), -F.logsigmoid(-beta * delta_B)
        if variant == "sigmoid":
            loss_B = (1 - label_smoothing) * right_B + label_smoothing * flipped_B
        else:
            loss_B = (1 - label_smoothing) * right_B - label_smoothing * flipped_B
            loss_B = loss_B / (1 - 2 * label_smoothing)
    else:
        raise ValueError(f"unknown DPO variant {variant!r}; choose sigmoid, robust or ipo")
    return loss_B.mean(), preference_statistics(
        policy_chosen_B, policy_rejected_B, beta * chosen_B, beta * rejected_B
    )


@torch.no_grad()
def preference_statistics(
    policy_chosen_B: Tensor, policy_rejected_B: Tensor, chosen_B: Tensor, rejected_B: Tensor
) -> dict[str, Tensor]:
    """Means over the pairs; an exact tie counts ½ in the accuracy, as a coin would decide it.

    Watch logps/chosen: DPO can lower both answers while their margin grows.
    """
    wins_B = (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()
    return {
        "rewards/chosen": chosen_B.mean(),
        "rewards/rejected": rejected_B.mean(),
        "rewards/margins": (chosen_B - rejected_B).mean(),
        "rewards/accuracies": wins_B.mean(),
        "logps/chosen": policy_chosen_B.float().mean(),
        "logps/rejected": policy_rejected_B.float().mean(),
    }
