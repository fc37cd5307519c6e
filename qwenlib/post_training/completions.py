"""Prompt + completion rows for DPO and GRPO: right-padded ids with labels on the completion only.

Shapes: N rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlib import kernels
from qwenlib.data.packing import IGNORE
from qwenlib.post_training.sft import scatter_logprobs, target_mask

# Up to so many logits (128 MB in fp32) lie in memory at once: one product with the head then does
# for both passes. More are computed some rows at a time, and again in the backward pass.
_WHOLE_LOGITS = 1 << 25


@dataclass(frozen=True)
class CompletionBatch:
    """Rows of prompt ids followed by completion ids; labels are -100 elsewhere.

    Padding is on the right, where causal attention needs no mask to ignore it.
    """

    input_ids_NT: Tensor
    labels_NT: Tensor

    def to(self, device: torch.device | str) -> "CompletionBatch":
        return CompletionBatch(self.input_ids_NT.to(device), self.labels_NT.to(device))

    @property
    def row_shape(self) -> tuple[int, int]:
        """Rows, and tokens of a row."""
        return tuple(self.input_ids_NT.shape)


def completion_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> CompletionBatch:
    """Build rows from ids as they were sampled: text is never tokenised a second time.

    Raises ValueError for an empty completion, which would have no label at all.
    """
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_ids_NT = torch.full((len(prompts), width), pad_id)
    labels_NT = torch.full((len(prompts), width), IGNORE)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not completion:
            raise ValueError(f"completion {i} is empty; drop it before building a batch")
        stop = len(prompt) + len(completion)
        input_ids_NT[i, :stop] = torch.tensor([*prompt, *completion])
        labels_NT[i, len(prompt) : stop] = torch.tensor(list(completion))
    return CompletionBatch(input_ids_NT, labels_NT)


def completion_logprobs(
    model, batch: CompletionBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token (N, T), and the mask of those tokens.

    Only the positions that predict a completion token go through the head: most of a row is
    prompt, and the head is the widest matrix. Equal to `sequence_logprobs(model(ids), labels)`, at
    a memory that does not grow with completions times vocabulary (`kernels.linear_logprobs`).
    """
    labels_NT, mask_NT = batch.labels_NT, target_mask(batch.labels_NT)
    hidden_MD = model.hidden(batch.input_ids_NT)[:, :-1][mask_NT[:, 1:]]
    weight_VD = model.lm_head.weight
    if len(hidden_MD) * len(weight_VD) <= _WHOLE_LOGITS:
        return scatter_logprobs(model.lm_head(hidden_MD), labels_NT, mask_NT, temperature)
    logp_M, _ = kernels.linear_logprobs(hidden_MD, weight_VD, labels_NT[mask_NT], temperature)
    return logp_M.new_zeros(labels_NT.shape).masked_scatter(mask_NT, logp_M), mask_NT
