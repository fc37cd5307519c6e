"""From logits to a token: penalty, temperature, top-k, top-p, and one draw a row.

Shapes: N rows, V vocabulary, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the order is that of transformers' processors.

    repetition_penalty: positive logits of tokens that the row already holds, prompt included, are
    divided by it, negative ones multiplied (arXiv 1909.05858). temperature: 0 is greedy. top_k: the
    k likeliest tokens stay (0: all). top_p: of these, the smallest set of likeliest ones whose
    mass reaches it stays (1: all).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if (
            self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0
            or self.repetition_penalty <= 0
        ):  # fmt: skip
            raise ValueError(
                "need temperature >= 0, 0 < top_p <= 1, top_k >= 0, repetition_penalty > 0; got "
                f"{self.temperature}, {self.top_p}, {self.top_k}, {self.repetition_penalty}"
            )


def penalise(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Logits with the repetition penalty; seen_NV marks the tokens that each row holds."""
    punished_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    return torch.where(seen_NV, punished_NV, logits_NV)


def candidates(logits_NV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities of the tokens that may be drawn, and their ids, both (N, C).

    Tokens that are cut off have probability 0; without top_k and top_p C is V.
    """
    scores_NC = logits_NV.float() / sampling.temperature
    V = scores_NC.shape[-1]
    if sampling.top_k and sampling.top_k < V:
        scores_NC, ids_NC = scores_NC.topk(sampling.top_k)  # likeliest first, as top_p needs
    elif sampling.top_p < 1:
        scores_NC, ids_NC = scores_NC.sort(descending=True)
    else:
        ids_NC = torch.arange(V, device=scores_NC.device).expand_as(scores_NC)
    p_NC = scores_NC.softmax(-1)
    if sampling.top_p < 1:
        before_NC = p_NC.cumsum(-1) - p_NC
        p_NC = p_NC.masked_fill(before_NC >= sampling.top_p, 0.0)
        p_NC = p_NC / p_NC.sum(-1, keepdim=True)
    return p_NC, ids_NC


def choose(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Tensor:
    """One token a row: the likeliest at temperature 0, else where uniform_N in [0, 1) falls.

    Inverting the distribution takes one random number a row; drawing one for each token of a
    vocabulary costs more than a small model's forward pass.
    """
    if sampling.temperature == 0:
        return logits_NV.argmax(-1)
    p_NC, ids_NC = candidates(logits_NV, sampling)
    mass_NC = p_NC.cumsum(-1)
    # Below the whole mass, whatever the rounding of the sum: a token of probability 0 is never hit.
    aim_N1 = (uniform_N[:, None] * mass_NC[:, -1:]).clamp(max=mass_NC[:, -1:].mul(1 - 1e-7))
    place_N1 = torch.searchsorted(mass_NC, aim_N1, right=True)
    return ids_NC.gather(1, place_N1.clamp(max=ids_NC.shape[1] - 1)).squeeze(1)
