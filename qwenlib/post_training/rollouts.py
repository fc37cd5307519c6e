"""GRPO's episodes (report §4.3): groups of answers, rewards, and one on-policy step each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlib.data.tasks import Task
from qwenlib.post_training.answers import Answers, answer_tasks
from qwenlib.post_training.completions import (
    CompletionBatch,
    completion_batch,
    completion_logprobs,
)
from qwenlib.post_training.grpo import group_advantages, group_variance, grpo_loss
from qwenlib.tokenizer import Tokenizer


@dataclass(frozen=True)
class RolloutBatch:
    """Rows of one episode with their advantages; stats are means over the episode."""

    rows: CompletionBatch
    advantages_N: Tensor
    stats: dict[str, float]

    @property
    def row_shape(self) -> tuple[int, int]:
        """Rows, and tokens of a row."""
        return self.rows.row_shape


def order_by_variance(answers: Answers) -> tuple[list[Task], list[float]]:
    """Tasks in descending order of their rewards' variance, and that variance (report §4.3).

    Ties keep the given order. A query that is always or never solved (variance 0) teaches nothing
    on policy and comes last.
    """
    variance_Q = group_variance(torch.tensor(answers.scores), answers.samples).tolist()
    order = sorted(range(len(answers.tasks)), key=lambda i: -variance_Q[i])
    return [answers.tasks[i] for i in order], [variance_Q[i] for i in order]


class Episodes:
    """Micro-batches of each step, sampled from the model as it stands at that step.

    A pure function of (weights, step), which is what the training loop asks of its batches:
    resuming from step k samples what the straight run sampled.
    """

    def __init__(
        self, model, tokenizer: Tokenizer, queries: Sequence[Task], *, queries_per_step: int,
        group_size: int, max_new_tokens: int, temperature: float, seed: int,
        advantage_scale: str = "std", micro_batch_size: int = 128,
    ):  # fmt: skip
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2 to compare answers, got {group_size}")
        if len(queries) < queries_per_step:
            raise ValueError(f"{len(queries)} queries are fewer than {queries_per_step} a step")
        self.model, self.tokenizer, self.queries = model, tokenizer, list(queries)
        self.queries_per_step, self.group_size = queries_per_step, group_size
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.advantage_scale, self.micro_batch_size = advantage_scale, micro_batch_size

    def queries_of(self, step: int) -> list[Task]:
        """The next slice of the ordered queries, from the front again after the last."""
        first = step * self.queries_per_step
        return [self.queries[(first + i) % len(self.queries)] for i in range(self.queries_per_step)]

    def batch(self, step: int) -> list[RolloutBatch]:
        """Sample, score and split the episode of `step`.

        Groups of equal rewards are left out of the forward pass: their advantages are exactly 0.
        They still count in the loss's denominator, as they would on paper.
        """
        answers = answer_tasks(
            self.model, self.tokenizer, self.queries_of(step), samples=self.group_size,
            max_new_tokens=self.max_new_tokens, temperature=self.temperature,
            seed=self.seed * 1_000_003 + step, batch_size=1024,
        )  # fmt: skip
        rewards_N = torch.tensor(answers.scores)
        advantages_N = group_advantages(rewards_N, self.group_size, scale=self.advantage_scale)
        flat = group_variance(rewards_N, self.group_size) == 0
        stats = {
            "reward": float(rewards_N.mean()),
            "zero_variance": float(flat.float().mean()),
            "length": sum(map(len, answers.completions)) / len(answers.completions),
            "finished": sum(answers.finished) / len(answers.finished),
        }
        useful = [i for i in range(len(rewards_N)) if advantages_N[i] != 0]
        # Rows of like length share a micro-batch; the sum over the step is the same.
        size = [len(answers.prompts[i // self.group_size]) + len(answers.completions[i])
                for i in range(len(rewards_N))]  # fmt: skip
        useful.sort(key=lambda i: size[i])
        parts = [
            useful[start : start + self.micro_batch_size]
            for start in range(0, len(useful), self.micro_batch_size)
        ] or [[0]]
        used = {i for part in parts for i in part}
        left_out = [len(c) for i, c in enumerate(answers.completions) if i not in used]
        batches = []
        for k, part in enumerate(parts):
            rows = completion_batch(
                [answers.prompts[i // self.group_size] for i in part],
                [answers.completions[i] for i in part],
                self.tokenizer.pad_token_id,
            )
            extra = {"rows_left_out": len(left_out), "tokens_left_out": sum(left_out)}
            if k:
                extra = dict.fromkeys(extra, 0)  # counted once a step
            batches.append(RolloutBatch(rows, advantages_N[part], stats | extra))
        return batches


def rollout_loss(temperature: float, aggregate: str = "sequence") -> Callable:
    """GRPO as a loss function of the training loop; strictly on policy, so the ratio is 1."""

    def loss_fn(model, batch: RolloutBatch):
        rows = batch.rows.to(next(model.parameters()).device)
        logp_NT, mask_NT = completion_logprobs(model, rows, temperature)
        loss_sum, count, _ = grpo_loss(
            logp_NT, None, batch.advantages_N.to(logp_NT.device), mask_NT, aggregate=aggregate
        )
        left_out = batch.stats["tokens_left_out" if aggregate == "token" else "rows_left_out"]
        stats = {key: batch.stats[key] for key in ("reward", "zero_variance", "length", "finished")}
        return loss_sum, count + left_out, stats

    return loss_fn
