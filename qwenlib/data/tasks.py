"""Verifiable maths and logic questions from reasoning-gym, with our own short worked solutions.

Train and held-out questions are disjoint by the hash of the question's text, not by seed: small
number ranges repeat, and a repeated question would measure memory. Answers are scored by
reasoning-gym's scorer on the extracted answer alone.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qwenlib.data.corpora import Document

ANSWER_PREFIX = "Answer:"
SYSTEM_PROMPT = "You are a helpful assistant."
_HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Task:
    """A question, its reference answer, and a short worked solution that ends with the answer."""

    family: str
    question: str
    answer: str
    solution: str
    metadata_json: str  # what reasoning-gym's scorer needs

    def messages(self, show_work: bool = True) -> list[dict[str, str]]:
        """The conversation that SFT trains on: the worked solution, or its last line alone."""
        content = self.solution if show_work else f"{ANSWER_PREFIX} {self.answer}"
        return [*self.prompt, {"role": "assistant", "content": content}]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation up to the model's turn."""
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": self.question},
        ]

    def row(self, show_work: bool = True) -> dict[str, Any]:
        """A data-set row with the columns the ecosystem uses."""
        return {
            "messages": self.messages(show_work),
            "prompt": self.prompt,
            "answer": self.answer,
            "family": self.family,
            "metadata": self.metadata_json,
        }


def _running_totals(expression: str) -> list[int]:
    """Totals after each term of an expression of + and -."""
    parts = expression.split()
    totals = [int(parts[0])]
    for operator, term in zip(parts[1::2], parts[2::2], strict=True):
        totals.append(totals[-1] + (int(term) if operator == "+" else -int(term)))
    return totals


def _solve_chain_sum(metadata: dict) -> list[str]:
    """One line a term: each step is one fact of the addition table."""
    parts, totals = metadata["expression"].split(), _running_totals(metadata["expression"])
    return [
        f"{total} {operator} {term} = {result}"
        for total, operator, term, result in zip(
            totals, parts[1::2], parts[2::2], totals[1:], strict=False
        )
    ]


def _solve_leg_counting(metadata: dict) -> list[str]:
    legs = _legs()
    lines, total = [], 0
    for animal, count in metadata["animals"].items():
        lines.append(f"{animal}: {count} * {legs[animal]} = {count * legs[animal]}")
        if total:
            lines.append(f"{total} + {count * legs[animal]} = {total + count * legs[animal]}")
        total += count * legs[animal]
    return lines


# Relation -> (the same without the sex, sex of the first person).
_RELATIONS = {
    "mother": ("parent", "woman"), "father": ("parent", "man"),
    "daughter": ("child", "woman"), "son": ("child", "man"),
    "wife": ("spouse", "woman"), "husband": ("spouse", "man"),
    "sister": ("sibling", "woman"), "brother": ("sibling", "man"),
    "grandmother": ("grandparent", "woman"), "grandfather": ("grandparent", "man"),
}  # fmt: skip


def _solve_family(metadata: dict) -> list[str]:
    """First what the story says, then what the name says."""
    first, second = metadata["person1"], metadata["person2"]
    relation, sex = _RELATIONS[metadata["relationship"]]
    return [f"{first} is the {relation} of {second}.", f"{first} is a {sex}."]


@functools.cache
def _legs() -> dict[str, int]:
    """Animal -> legs, as reasoning-gym counts them."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return ANIMALS


@dataclass(frozen=True)
class Family:
    """One reasoning-gym generator: its settings, a worked solution, and which entries to take."""

    generator: str
    settings: dict[str, Any]
    solve: Callable[[dict], list[str]]
    accept: Callable[[dict, str], bool] = lambda metadata, answer: True


FAMILIES: dict[str, Family] = {
    "chain_sum": Family(
        "chain_sum",
        {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
        _solve_chain_sum,
        lambda metadata, answer: min(_running_totals(metadata["expression"])) >= 0,
    ),
    "leg_counting": Family(
        "leg_counting",
        {"min_animals": 1, "max_animals": 2, "max_instances": 9},
        _solve_leg_counting,
    ),
    "family_relationships": Family(
        "family_relationships",
        {"min_family_size": 3, "max_family_size": 4},
        _solve_family,
        # The generator names in-laws inversely (a son's wife is its "mother-in-law"); families
        # this small have no aunts, uncles, nieces or nephews.
        lambda metadata, answer: answer in _RELATIONS,
    ),
}


@functools.cache
def _generator(family: str, seed: int):
    import reasoning_gym

    spec = FAMILIES[family]
    return reasoning_gym.create_dataset(spec.generator, size=1 << 30, seed=seed, **spec.settings)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out split; a property of its text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < _HELD_OUT_SHARE


def generate_tasks(
    count: int, seed: int, split: str = "train", families: tuple[str, ...] | None = None
) -> list[Task]:
    """`count` tasks, families in turn. Held-out questions are distinct; train ones may repeat.

    Raises ValueError for an unknown split or family, or when a family runs out of questions.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    families = tuple(families or FAMILIES)
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    streams = [_stream(family, _hashed(family, seed), split) for family in families]
    return _in_turn(streams, count)


def _hashed(family: str, seed: int) -> int:
    """Entry i is drawn from seed + i: neighbouring seeds would give one stream, shifted by one."""
    return int.from_bytes(hashlib.sha256(f"{family}/{seed}".encode()).digest()[:6], "big")


def _in_turn(streams: list[Iterator[Task]], count: int) -> list[Task]:
    return [next(streams[i % len(streams)]) for i in range(count)]


def _stream(family: str, seed: int, split: str) -> Iterator[Task]:
    generator, spec = _generator(family, seed), FAMILIES[family]
    seen: set[str] = set()
    misses = 0
    for index in range(1 << 30):
        entry = generator[index]
        question = entry["question"].strip()
        wrong_split = is_held_out(question) != (split == "heldout")
        repeated = split == "heldout" and question in seen
        accepted = spec.accept(entry["metadata"], str(entry["answer"]))
        if wrong_split or repeated or not accepted:
            misses += 1
            if misses > 20_000:
                raise ValueError(f"family {family!r} has only {len(seen)} {split} questions")
            continue
        seen.add(question)
        misses = 0
        lines = [*spec.solve(entry["metadata"]), f"{ANSWER_PREFIX} {entry['answer']}"]
        metadata = json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]})
        yield Task(family, question, str(entry["answer"]), "\n".join(lines), metadata)


def extract_answer(completion: str) -> str | None:
    """The text behind the last "Answer:"; None if there is none.

    Only the last line counts, so a completion cannot list every candidate and be right with one.
    """
    lines = completion.strip().splitlines()
    if not lines or not lines[-1].startswith(ANSWER_PREFIX):
        return None
    return lines[-1].removeprefix(ANSWER_PREFIX).strip() or None


def shows_work(completion: str) -> bool:
    """Whether something stands before the last line."""
    return "\n" in completion.strip()


@functools.cache
def _scorer(generator: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(generator)


def score(task: Task, completion: str) -> float:
    """1.0 when the completion's extracted answer is fully right, else 0.0; no partial credit."""
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    entry = json.loads(task.metadata_json)
    return float(_scorer(FAMILIES[task.family].generator)(answer, entry) == 1.0)


def heldout_questions(seed: int = 0, count: int = 500) -> list[str]:
    """Questions that the pretraining text is decontaminated against, families in turn."""
    streams = [_stream(family, seed, "heldout") for family in FAMILIES]
    return [task.question for task in _in_turn(streams, count)]


_TEMPLATES = (
    "Problem. {question}\n\nWorked solution:\n{steps}\nThe result is {answer}.",
    "Exercise: {question}\n{steps}\nHence {answer}.",
    "Q: {question}\nA: {steps}\nSo the answer is {answer}.",
    "{question}\n\n{steps}\n\n({answer})",
)


def corpus_documents(seed: int, limit_mb: float) -> Iterator[Document]:
    """Textbook-like pages of a few solved train problems each, about `limit_mb` megabytes.

    The wording is not that of the chat data, so that answering in ChatML is left for SFT to teach.
    """
    budget, page = limit_mb * 1e6, 0
    streams = [_stream(family, seed, "train") for family in FAMILIES]
    rng = random.Random(seed)
    while budget > 0:
        template = rng.choice(_TEMPLATES)
        parts = []
        for _ in range(rng.randint(2, 5)):
            task = next(rng.choice(streams))
            steps = task.solution.rsplit("\n", 1)[0]
            parts.append(template.format(question=task.question, steps=steps, answer=task.answer))
        text = "\n\n".join(parts)
        budget -= len(text.encode())
        yield Document(f"maths-{seed}-{page}", text, "maths", "maths", "en")
        page += 1


def normalise_question(text: str) -> str:
    """Lower-case, one space between words: the form in which questions are compared."""
    return re.sub(r"\s+", " ", text).strip().lower()
