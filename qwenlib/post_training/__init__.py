"""Report §4: SFT's targets, the losses of DPO and GRPO, and Online Merging."""

from qwenlib.post_training.dpo import dpo_loss
from qwenlib.post_training.grpo import (
    completion_mask,
    group_advantages,
    group_variance,
    grpo_loss,
)
from qwenlib.post_training.online_merging import OnlineMergingAdamW, task_vectors
from qwenlib.post_training.sft import labels_from_mask, sequence_logprobs

__all__ = [
    "OnlineMergingAdamW",
    "completion_mask",
    "dpo_loss",
    "group_advantages",
    "group_variance",
    "grpo_loss",
    "labels_from_mask",
    "sequence_logprobs",
    "task_vectors",
]
