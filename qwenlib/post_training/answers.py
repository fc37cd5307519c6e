"""A model answers verifiable tasks in ChatML, and each answer is scored by the task's verifier.

DPO builds its pairs from such answers, GRPO its rewards, evaluation its accuracies: one function,
so that all three mean the same thing by "right".
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qwenlib.data.tasks import Task, score
from qwenlib.generation import generate
from qwenlib.model.accounting import kv_bytes_per_token
from qwenlib.tokenizer import Tokenizer
from qwenlib.tokenizer.chat import encode_chat

# On a CPU a larger batch stops paying long before its cache fills the memory.
_CPU_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Answers:
    """`samples` answers a task, those of a task side by side: index i * samples + j.

    completions hold the sampled ids, stop token included; scores are 1.0 (right) or 0.0.
    """

    tasks: list[Task]
    samples: int
    prompts: list[list[int]]
    completions: list[list[int]]
    texts: list[str]
    scores: list[float]
    finished: list[bool]

    @property
    def accuracy(self) -> float:
        """Mean score: greedy accuracy for one greedy answer, pass@1 for samples."""
        return sum(self.scores) / len(self.scores)

    @property
    def by_family(self) -> dict[str, float]:
        """Mean score of each task family."""
        groups = defaultdict(list)
        for i, value in enumerate(self.scores):
            groups[self.tasks[i // self.samples].family].append(value)
        return {family: sum(v) / len(v) for family, v in groups.items()}

    def of_task(self, index: int) -> range:
        """Indices of the answers to task `index`."""
        return range(index * self.samples, (index + 1) * self.samples)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids that end an answer: <|im_end|> and <|endoftext|>, as the released models stop."""
    return tokenizer.eos_token_id, tokenizer.end_of_text_id


def answer_tasks(
    model, tokenizer: Tokenizer, tasks: Sequence[Task], *, max_new_tokens: int,
    temperature: float = 0.0, samples: int = 1, seed: int = 0, batch_size: int = 256,
) -> Answers:  # fmt: skip
    """Ask each task `samples` times (temperature 0: greedily) and score the decoded answers.

    batch_size: most answers written at a time; fewer where, on a CPU, their cache would take more
    than 2 GiB.
    """
    tasks = list(tasks)
    prompts = [encode_chat(tokenizer, t.prompt, add_generation_prompt=True)[0] for t in tasks]
    rows = _most_rows(model, prompts, max_new_tokens)
    generation = generate(
        model, prompts, max_new_tokens, temperature=temperature, samples=samples, seed=seed,
        eos_ids=stop_ids(tokenizer), batch_size=min(batch_size, rows),
    )  # fmt: skip
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generation.completions]
    # An answer cut at the limit is wrong even if its text happens to hold the right line.
    scores = [
        score(tasks[i // samples], text) if done else 0.0
        for i, (text, done) in enumerate(zip(texts, generation.finished, strict=True))
    ]
    return Answers(
        tasks, samples, prompts, generation.completions, texts, scores, generation.finished
    )


def _most_rows(model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not prompts:
        return sys.maxsize
    tokens = max(map(len, prompts)) + max_new_tokens
    row_bytes = tokens * kv_bytes_per_token(model.config, weight.element_size())
    return max(1, int(_CPU_CACHE_BYTES // row_bytes))


def pass_at_k(scores: Sequence[float], samples: int, k: int) -> float:
    """Unbiased pass@k (arXiv 2107.03374): 1 - C(n-c, k) / C(n, k), averaged over tasks.

    Raises ValueError when k exceeds the samples a task has.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a task, there are {samples}")
    values = []
    for start in range(0, len(scores), samples):
        wrong = samples - sum(s == 1.0 for s in scores[start : start + samples])
        miss = 1.0
        for i in range(k):
            miss *= max(wrong - i, 0) / (samples - i)
        values.append(1 - miss)
    return sum(values) / len(values)
