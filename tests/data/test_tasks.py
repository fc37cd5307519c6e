"""Verifiable tasks: disjoint splits, right solutions, and a verifier that cannot be gamed."""

import functools
import itertools
import re

import pytest

from qwenlib.data.tasks import (
    FAMILIES,
    corpus_documents,
    extract_answer,
    generate_tasks,
    heldout_questions,
    is_held_out,
    normalise_question,
    score,
)


@functools.cache
def tasks(split="train", count=200, seed=0):
    return generate_tasks(count, seed, split)


def test_splits_are_disjoint_by_text():
    train = {normalise_question(task.question) for task in tasks(count=600)}
    heldout = [task.question for task in tasks("heldout", 200)]
    assert not train & {normalise_question(question) for question in heldout}
    other_seed = {task.question for task in generate_tasks(200, 5, "train")}
    assert not other_seed & set(heldout)
    assert len(set(heldout)) == len(heldout), "held-out questions are distinct"
    assert all(map(is_held_out, heldout)) and not any(map(is_held_out, train & other_seed))
    questions = heldout_questions(0, 60)
    assert questions == heldout_questions(0, 90)[:60] and all(map(is_held_out, questions))


def test_seeds_give_other_questions():
    """reasoning-gym draws entry i from seed + i, so neighbouring seeds were one shifted stream."""
    for split in ("train", "heldout"):
        one, two = (
            {task.question for task in generate_tasks(200, seed, split, ("chain_sum",))}
            for seed in (0, 1)
        )
        assert len(one & two) < 0.2 * len(one), split


def test_families_in_turn_and_seeds():
    count = 2 * len(FAMILIES)
    got = tasks(count=count)
    assert [task.family for task in got] == [*FAMILIES] * 2
    assert got == generate_tasks(count, 0) != generate_tasks(count, 1)
    only = generate_tasks(3, 0, families=("chain_sum",))
    assert {task.family for task in only} == {"chain_sum"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_solution_is_accepted(split):
    for task in tasks(split):
        assert score(task, task.solution) == 1.0, task
        assert extract_answer(task.solution) == task.answer


def test_worked_steps_are_true():
    """Each arithmetic line holds, and the last one is the answer."""
    lines = 0
    for task in tasks():
        steps = task.solution.splitlines()[:-1]
        for line in steps:
            if match := re.search(r"(-?\d+) ([-+*]) (\d+) = (-?\d+)$", line):
                left, operator, right, result = match.groups()
                left, right = int(left), int(right)
                true = {"+": left + right, "-": left - right, "*": left * right}[operator]
                assert true == int(result), task
                lines += 1
        if task.family in ("chain_sum", "leg_counting"):
            assert steps[-1].split()[-1] == task.answer
        else:
            first, second = re.search(r"(?:is|relation is|related) (\w+) (?:to|related to) (\w+)",
                                      task.question.splitlines()[-1]).groups()  # fmt: skip
            role = {"mother": "parent", "father": "parent", "wife": "spouse", "husband": "spouse",
                    "son": "child", "daughter": "child"}[task.answer]  # fmt: skip
            sex = "woman" if task.answer in ("mother", "wife", "daughter") else "man"
            assert steps == [f"{first} is the {role} of {second}.", f"{first} is a {sex}."]
    assert lines > 100


def wrong_answers(task):
    """Other answers of the same family."""
    return {t.answer for t in tasks() if t.family == task.family and t.answer != task.answer}


@pytest.mark.parametrize("family", FAMILIES)
def test_tricks_score_nothing(family):
    for task in [task for task in tasks() if task.family == family][:20]:
        right, wrong = task.answer, sorted(wrong_answers(task))[0]
        tricks = [
            "", "Answer:", "Answer: ", right, f"The answer is {right}.",
            f"Answer: {wrong}",
            f"Answer: {wrong} {right}", f"Answer: {right} {wrong}",
            f"Answer: {right} or {wrong}", f"Answer: {right}, {wrong}",
            f"Answer: {right}\nAnswer: {wrong}",  # the last one counts
            f"Answer: {right}\nThat is it.",
            f"answer: {right}",
            "Answer: " + " ".join([right, *sorted(wrong_answers(task))[:20]]),
        ]  # fmt: skip
        for trick in tricks:
            assert score(task, trick) == 0.0, (task.question, trick)
        assert score(task, f"Answer: {wrong}\nAnswer: {right}") == 1.0
        assert score(task, f"Answer: {right}\n\n") == 1.0


def test_extract_answer():
    assert extract_answer("steps\nAnswer:  42 ") == "42"
    assert extract_answer("Answer: 1\nAnswer: 2") == "2"
    assert extract_answer("Answer: 1\nmore") is None
    assert extract_answer("  \n") is None


def test_conversation_and_row():
    task = tasks()[0]
    assert [m["role"] for m in task.messages()] == ["system", "user", "assistant"]
    assert task.messages()[:2] == task.prompt and task.messages()[2]["content"] == task.solution
    assert task.answer not in task.prompt[0]["content"]
    assert set(task.row()) == {"messages", "prompt", "answer", "family", "metadata"}


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="split"):
        generate_tasks(1, 0, "test")
    with pytest.raises(ValueError, match="chain_summ.*known: chain_sum"):
        generate_tasks(1, 0, families=("chain_summ",))


def test_pages_hold_train_questions_only():
    documents = list(corpus_documents(2, 0.03))
    assert documents == list(corpus_documents(2, 0.03))
    text = normalise_question("\n".join(d.text for d in documents))
    assert 30_000 <= len(text.encode()) * 1.2 and len({d.id for d in documents}) == len(documents)
    for question in heldout_questions(0, 200):
        assert normalise_question(question) not in text
    steps = itertools.chain.from_iterable(task.solution.splitlines()[:-1] for task in tasks())
    assert any(step.lower() in text for step in steps), "pages show worked steps"
    assert "Answer:" not in "".join(d.text for d in documents), "the chat form is left to SFT"
