"""Supervised fine-tuning (report §4.1): which tokens are targets, and how likely each is.

Shapes: B rows, T tokens, V vocabulary. Labels follow the Hugging Face convention everywhere:
`labels_BT[b, t]` is the token at position t or -100, and the shift by one happens inside the loss.
"""

import torch
from torch import Tensor

IGNORE = -100


def labels_from_mask(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Labels that train the tokens with mask 1: content and <|im_end|> of the assistant's turns.

    The mask marks targets, by position and never by id: a pad token that is also a stop token must
    not hide the stop token. Column 0 has nothing before it and is never a target.
    Raises ValueError when the shapes differ.
    """
    if ids_BT.shape != mask_BT.shape:
        raise ValueError(f"ids {tuple(ids_BT.shape)} and mask {tuple(mask_BT.shape)} differ")
    labels_BT = torch.where(mask_BT.bool(), ids_BT, IGNORE)
    labels_BT[..., 0] = IGNORE
    return labels_BT


def sequence_logprobs(
    logits_BTV: Tensor, labels_BT: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, aligned with it, and the mask of the labels that count.

    `token_logp_BT[b, t]` is log p(labels[b, t] | ids[b, <t]) in fp32, read from the logits of
    position t-1; it is 0 where the mask is False (label -100, and column 0). Only the target
    positions enter the softmax, so a NaN elsewhere reaches neither the value nor the gradient.
    Sampling at a temperature needs the same temperature here. Raises ValueError on unequal shapes.
    """
    if logits_BTV.shape[:-1] != labels_BT.shape:
        raise ValueError(
            f"logits {tuple(logits_BTV.shape)} do not belong to labels {tuple(labels_BT.shape)}; "
            "labels are unshifted and as long as the input"
        )
    mask_BT = target_mask(labels_BT)
    return scatter_logprobs(logits_BTV[:, :-1][mask_BT[:, 1:]], labels_BT, mask_BT, temperature)


def target_mask(labels_BT: Tensor) -> Tensor:
    """True where a label counts; never in column 0, which has nothing before it."""
    mask_BT = labels_BT != IGNORE
    mask_BT[:, 0] = False
    return mask_BT


def scatter_logprobs(
    logits_MV: Tensor, labels_BT: Tensor, mask_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`sequence_logprobs` of the M positions before a target, given their logits alone."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits_MV = logits_MV.float() / temperature
    chosen_M = logits_MV.gather(-1, labels_BT[mask_BT].unsqueeze(-1)).squeeze(-1)
    logp_M = chosen_M - logits_MV.logsumexp(-1)
    return logp_M.new_zeros(labels_BT.shape).masked_scatter(mask_BT, logp_M), mask_BT
