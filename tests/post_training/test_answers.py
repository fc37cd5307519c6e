"""Answers and their scores: what counts as right, and pass@k by enumeration."""

import functools
import itertools

import pytest

from qwenlib.data.tasks import generate_tasks
from qwenlib.generation import Generation
from qwenlib.model import Qwen, QwenConfig
from qwenlib.post_training import answers as room
from qwenlib.post_training.answers import answer_tasks, pass_at_k, stop_ids
from qwenlib.tokenizer import Tokenizer, train_bpe
from qwenlib.tokenizer.chat import render


@functools.cache
def tasks():
    return generate_tasks(4, 0)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_merges(train_bpe([t.question + t.solution for t in tasks()], 330))


def model() -> Qwen:
    shape = QwenConfig(
        vocab_size=tokenizer().vocab_size, hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, initializer_range=0.4,
    )  # fmt: skip
    return Qwen(shape).initialise(0)


def fake(monkeypatch, texts, finished):
    """The model says these texts, whatever it is asked; returns what it was asked."""
    asked = []

    def generate(model, prompts, max_new_tokens, **options):
        asked.append((prompts, options))
        stop = tokenizer().eos_token_id
        ids = [tokenizer().encode(t) + [stop] * done for t, done in zip(texts, finished)]
        return Generation(ids, finished)

    monkeypatch.setattr(room, "generate", generate)
    return asked


def test_right_wrong_and_cut_answers(monkeypatch):
    one, two = tasks()[:2]
    texts = [one.solution, "Answer: no", "x", two.solution, two.solution, ""]
    asked = fake(monkeypatch, texts, [True, True, True, True, False, True])
    got = answer_tasks(model(), tokenizer(), [one, two], max_new_tokens=9, samples=3)
    assert got.scores == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0], "an answer cut at the limit is wrong"
    assert got.accuracy == pytest.approx(1 / 3)
    assert got.by_family == {one.family: pytest.approx(1 / 3), two.family: pytest.approx(1 / 3)}
    assert list(got.of_task(1)) == [3, 4, 5]
    assert got.texts[0] == one.solution, "the stop token is no text"
    prompts, options = asked[0]
    assert tokenizer().decode(prompts[0]) == render(one.prompt, add_generation_prompt=True)
    assert one.solution not in tokenizer().decode(prompts[0])
    assert tuple(options["eos_ids"]) == stop_ids(tokenizer())


def test_stop_ids_are_the_released_ones():
    control = tokenizer().control
    assert stop_ids(tokenizer()) == (control["<|im_end|>"], control["<|endoftext|>"])


def test_a_real_model_is_asked_and_seeded():
    net = model()
    options = {"max_new_tokens": 5, "temperature": 1.0, "samples": 2}
    one, same, other = (
        answer_tasks(net, tokenizer(), tasks(), seed=s, **options) for s in (1, 1, 2)
    )
    assert one.completions == same.completions != other.completions
    assert len(one.completions) == 8 and len(one.prompts) == 4


@pytest.mark.parametrize(("budget", "rows"), [(2 * 2**30, 99), (2**16, 2), (1, 1)])
def test_a_cpu_answers_as_many_at_a_time_as_their_cache_allows(monkeypatch, budget, rows):
    """A token of this model's cache takes 2 * 8 * 4 bytes; 2**16 bytes hold 1,024 of them."""
    asked = fake(monkeypatch, ["Answer: 1"] * 4, [True] * 4)
    monkeypatch.setattr(room, "_CPU_CACHE_BYTES", budget)
    longest = max(len(p) for p in answer_tasks(model(), tokenizer(), tasks(), max_new_tokens=1)
                  .prompts)  # fmt: skip
    asked.clear()
    answer_tasks(model(), tokenizer(), tasks(), max_new_tokens=400 - longest, batch_size=99)
    assert asked[0][1]["batch_size"] == rows


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(k):
    scores = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    hits = [
        any(draw) for start in (0, 4, 8)
        for draw in itertools.combinations(scores[start : start + 4], k)
    ]  # fmt: skip
    assert pass_at_k(scores, 4, k) == pytest.approx(sum(hits) / len(hits))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples"):
        pass_at_k([1.0] * 4, 4, 5)
