"""Report §4: the losses and the optimiser of SFT, DPO and GRPO, as pure functions of tensors."""

from qwenlib.post_training.dpo import dpo_loss
from qwenlib.post_training.grpo import (
    completion_mask,
    group_advantages,
    group_variance,
    grpo_loss,
)
from qwenlib.post_training.online_merging import OnlineMergingAdamW, task_vectors
from qwenlib.post_training.sft import labels_from_mask, sequence_logprobs, sft_loss

__all__ = [
    "OnlineMergingAdamW",
    "completion_mask",
    "dpo_loss",
    "group_advantages",
    "group_variance",
    "grpo_loss",
    "labels_from_mask",
    "sequence_logprobs",
    "sft_loss",
    "task_vectors",
]
