"""Supervised fine-tuning (report §4.1): which tokens are targets, and what they cost.

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
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    mask_BT = labels_BT != IGNORE
    mask_BT[:, 0] = False
    logits_MV = logits_BTV[:, :-1][mask_BT[:, 1:]].float() / temperature
    chosen_M = logits_MV.gather(-1, labels_BT[mask_BT].unsqueeze(-1)).squeeze(-1)
    logp_M = chosen_M - logits_MV.logsumexp(-1)
    token_logp_BT = logp_M.new_zeros(labels_BT.shape).masked_scatter(mask_BT, logp_M)
    return token_logp_BT, mask_BT


def sft_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over the targets, their count, and statistics.

    The loop divides the sum by the count over *all* micro-batches and ranks of an optimiser step.
    A mean per micro-batch would weigh a token of a short batch more than one of a long batch. With
    no target at all the sum is 0, still attached to the graph.

    Two uniform logits: two targets cost 2 ln 2 = 1.3863, and dividing by the count gives ln 2.
    """
    token_logp_BT, mask_BT = sequence_logprobs(logits_BTV, labels_BT)
    count = mask_BT.sum()
    with torch.no_grad():
        guess_BT = logits_BTV[:, :-1].argmax(-1)
        correct = ((guess_BT == labels_BT[:, 1:]) & mask_BT[:, 1:]).sum()
        share = mask_BT.float().mean()
    stats = {"token_accuracy": correct / count.clamp(min=1), "target_share": share}
    return -token_logp_BT.sum(), count, stats
