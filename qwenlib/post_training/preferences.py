"""Preference pairs for DPO (report §4.2): sampled answers, judged by execution, not by taste."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwenlib.data.tasks import Task
from qwenlib.post_training.answers import Answers
from qwenlib.post_training.completions import (
    CompletionBatch,
    completion_batch,
    completion_logprobs,
)
from qwenlib.post_training.dpo import dpo_loss


@dataclass(frozen=True)
class Pair:
    """One prompt with a verified and a refuted answer, as the ids that were sampled."""

    task: Task
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B rows: the chosen ones first, then the rejected ones in the same order."""

    rows: CompletionBatch
    reference_2B: Tensor

    @property
    def row_shape(self) -> tuple[int, int]:
        """Rows, and tokens of a row."""
        return self.rows.row_shape

    def part(self, number: int, of: int) -> "PairBatch":
        """Part `number` of `of` of the pairs, each with both its answers."""
        pairs = len(self.reference_2B) // 2
        chosen = torch.arange(pairs * number // of, pairs * (number + 1) // of)
        both = torch.cat([chosen, pairs + chosen])
        rows = CompletionBatch(self.rows.input_ids_NT[both], self.rows.labels_NT[both])
        return PairBatch(rows, self.reference_2B[both])


def build_pairs(
    answers: Answers, per_task: int = 1, min_pass_rate: float = 0.0,
    max_length_ratio: float = 1.65, usable: Callable[[str], bool] = bool,
) -> list[Pair]:  # fmt: skip
    """Pair right answers with wrong ones of the same task; a task needs both to give any.

    Answers whose text is not `usable` do not exist here. Tasks of which less than `min_pass_rate`
    of the others are right give no pair: a verifier that looks at the last line lets lucky guesses
    pass, and they are most of what a hard task's "right" answers are. Answers that were cut at the
    length limit are left out, and so are pairs whose lengths differ by more than the ratio (a
    length is an easier lesson than the content). Identical answers count once. The pairs of a task
    use different answers as long as there are some.
    """
    pairs = []
    for i, task in enumerate(answers.tasks):
        used = [j for j in answers.of_task(i) if usable(answers.texts[j])]
        if sum(answers.scores[j] for j in used) < min_pass_rate * len(used):
            continue
        right, wrong = {}, {}
        for j in used:
            if answers.finished[j]:
                side = right if answers.scores[j] == 1.0 else wrong
                side.setdefault(tuple(answers.completions[j]))
        taken = 0
        for chosen, rejected in _spread(list(right), list(wrong)):
            ratio = len(chosen) / len(rejected)
            if taken < per_task and 1 / max_length_ratio <= ratio <= max_length_ratio:
                pairs.append(Pair(task, answers.prompts[i], list(chosen), list(rejected)))
                taken += 1
    return pairs


def _spread(right: list, wrong: list) -> list[tuple]:
    """All pairs, those that repeat an answer last."""
    order = [(a, b) for a in range(len(right)) for b in range(len(wrong))]
    order.sort(key=lambda ab: (abs(ab[0] - ab[1]), ab))
    return [(right[a], wrong[b]) for a, b in order]


@torch.no_grad()
def summed_logprobs(model, pairs: Sequence[Pair], pad_id: int, batch_size: int = 64) -> Tensor:
    """Log-probability of each answer: (pairs, 2), chosen then rejected."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    out = []
    for start in range(0, len(pairs), batch_size):
        rows = _rows(pairs[start : start + batch_size], pad_id).to(device)
        token_logp_NT, _ = completion_logprobs(model, rows)
        out.append(token_logp_NT.sum(-1).view(2, -1).T.cpu())
    model.train(was_training)
    return torch.cat(out)


def _rows(pairs: Sequence[Pair], pad_id: int) -> CompletionBatch:
    prompts = [pair.prompt for pair in pairs] * 2
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return completion_batch(prompts, answers, pad_id)


class PairSampler:
    """Batches of pairs as a function of the step, with the reference's log-probs computed once."""

    def __init__(
        self, pairs: Sequence[Pair], reference_P2: Tensor, batch_size: int, pad_id: int,
        seed: int,
    ):  # fmt: skip
        if len(pairs) < batch_size:
            raise ValueError(f"{len(pairs)} pairs are fewer than one batch of {batch_size}")
        if len(reference_P2) != len(pairs):
            raise ValueError(f"{len(reference_P2)} reference rows for {len(pairs)} pairs")
        self.pairs, self.reference_P2 = list(pairs), reference_P2
        self.batch_size, self.pad_id, self.seed = batch_size, pad_id, seed
        self.steps_per_epoch = len(self.pairs) // batch_size

    def batch(self, step: int) -> PairBatch:
        """Pairs of optimiser step `step`; the incomplete batch of an epoch is left out."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        rows = _rows([self.pairs[i] for i in chosen], self.pad_id)
        return PairBatch(rows, self.reference_P2[torch.from_numpy(chosen)].T.reshape(-1))


def pair_loss(beta: float) -> Callable:
    """DPO as a loss function of the training loop: (model, PairBatch) -> (sum, pairs, stats)."""

    def loss_fn(model, batch: PairBatch):
        rows = batch.rows.to(next(model.parameters()).device)
        token_logp_NT, _ = completion_logprobs(model, rows)
        policy_2B = token_logp_NT.sum(-1)
        reference_2B = batch.reference_2B.to(policy_2B.device)
        loss, stats = dpo_loss(*policy_2B.chunk(2), *reference_2B.chunk(2), beta=beta)
        count = torch.tensor(len(policy_2B) // 2)
        return loss * count, count, stats

    return loss_fn


def implicit_accuracy(policy_P2: Tensor, reference_P2: Tensor) -> float:
    """Share of pairs whose chosen answer gained more log-probability than the rejected one."""
    gain_P = (policy_P2 - reference_P2)[:, 0] - (policy_P2 - reference_P2)[:, 1]
    return float(((gain_P > 0).float() + 0.5 * (gain_P == 0).float()).mean())
