"""GRPO's episodes: pure in (weights, step), and flat groups left out change nothing."""

import dataclasses
import functools

import pytest
import torch

from qwenlib.data.tasks import generate_tasks
from qwenlib.model import Qwen, QwenConfig
from qwenlib.post_training import rollouts
from qwenlib.post_training.answers import Answers, answer_tasks
from qwenlib.post_training.completions import completion_batch, completion_logprobs
from qwenlib.post_training.grpo import group_advantages, grpo_loss
from qwenlib.post_training.rollouts import Episodes, order_by_variance, rollout_loss
from qwenlib.tokenizer import Tokenizer, train_bpe

GROUP, QUERIES = 4, 3


@functools.cache
def tasks():
    return generate_tasks(6, 0, families=("chain_sum", "leg_counting"))


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_merges(train_bpe([t.question + t.solution for t in tasks()], 330))


def model(seed=0) -> Qwen:
    shape = QwenConfig(
        vocab_size=tokenizer().vocab_size, hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, initializer_range=0.4,
    )  # fmt: skip
    return Qwen(shape).initialise(seed)


def scored(flat: int):
    """`answer_tasks`, but rewards that a random model cannot earn: the first `flat` queries all
    fail, of the others the answers with an even first token are right; lengths are uneven."""

    def ask(*args, **options):
        got = answer_tasks(*args, **options)
        completions = [ids[: 2 + i % 4] for i, ids in enumerate(got.completions)]
        scores = [
            float(ids[0] % 2 == 0) if i // GROUP >= flat else 0.0
            for i, ids in enumerate(completions)
        ]
        return dataclasses.replace(got, scores=scores, completions=completions)

    return ask


def episodes(net, micro=5, seed=0):
    return Episodes(
        net, tokenizer(), tasks(), queries_per_step=QUERIES, group_size=GROUP, max_new_tokens=6,
        temperature=1.0, seed=seed, micro_batch_size=micro,
    )  # fmt: skip


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a.rows.input_ids_NT, b.rows.input_ids_NT)
        and torch.equal(a.rows.labels_NT, b.rows.labels_NT)
        and torch.equal(a.advantages_N, b.advantages_N)
        and a.stats == b.stats
        for a, b in zip(one, two)
    )


def test_batch_is_a_function_of_weights_and_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "answer_tasks", scored(flat=1))
        net = model()
        one = episodes(net)
        first = one.batch(1)
        torch.manual_seed(7)
        one.batch(0)
        assert same(first, one.batch(1)) and same(first, episodes(model()).batch(1))
        assert not same(first, one.batch(3))  # the same queries, another draw
        assert not same(first, episodes(net, seed=1).batch(1))
        assert not same(first, episodes(model(1)).batch(1))
        assert net.training


def test_queries_go_round():
    one = episodes(model())
    assert one.queries_of(0) == tasks()[:3] and one.queries_of(1) == tasks()[3:]
    assert one.queries_of(2) == tasks()[:3]


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.parametrize("flat", [0, 1, 2, 3])
def test_flat_groups_left_out_change_nothing(aggregate, flat):
    """Loss and gradient of the step equal those of one batch with every row kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "answer_tasks", scored(flat))
        net = model()
        batches = episodes(net).batch(0)
        kept, options = [], {"samples": GROUP, "max_new_tokens": 6, "temperature": 1.0}
        everything = scored(flat)(net, tokenizer(), tasks()[:3], seed=0, batch_size=1024, **options)
    total, count = 0.0, 0
    for batch in batches:
        loss, n, stats = rollout_loss(1.0, aggregate)(net, batch)
        loss.backward()
        total, count = total + loss.item(), count + int(n)
        kept.append(len(batch.advantages_N))
        assert stats["zero_variance"] >= flat / QUERIES - 1e-6
    gradients = [parameter.grad.clone() / count for parameter in net.parameters()]
    net.zero_grad()
    rows = completion_batch(
        [p for p in everything.prompts for _ in range(GROUP)], everything.completions,
        tokenizer().pad_token_id,
    )  # fmt: skip
    advantages = group_advantages(torch.tensor(everything.scores), GROUP, scale="std")
    logp, mask = completion_logprobs(net, rows, 1.0)
    want, want_count, _ = grpo_loss(logp, None, advantages, mask, aggregate=aggregate)
    assert count == int(want_count), "rows left out still count"
    assert total == pytest.approx(want.item(), abs=1e-5)
    (want / want_count).backward()
    assert flat == QUERIES or max(g.abs().max() for g in gradients) > 1e-4
    for got, parameter in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-6, rtol=1e-4)
    assert sum(kept) == int((advantages != 0).sum()) or (flat == QUERIES and kept == [1])


def test_micro_batches_hold_rows_of_like_length():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "answer_tasks", scored(flat=0))
        widths = [b.rows.input_ids_NT.shape[1] for b in episodes(model(), micro=3).batch(0)]
    assert widths == sorted(widths) and len(widths) > 2


def test_queries_are_ordered_by_the_variance_of_their_rewards():
    scores = [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    got, variance = order_by_variance(
        Answers(tasks()[:4], 4, [], [], [], [float(s) for s in scores], [])
    )
    assert got == [tasks()[i] for i in (2, 1, 0, 3)]
    assert variance == pytest.approx([1 / 3, 1 / 4, 0, 0])


def test_bad_sizes_are_named():
    for options, message in (({"group_size": 1}, "group_size"), ({"queries_per_step": 7}, "fewer")):
        values = {"queries_per_step": 2, "group_size": 4, "max_new_tokens": 2, "temperature": 1.0}
        with pytest.raises(ValueError, match=message):
            Episodes(None, tokenizer(), tasks(), seed=0, **(values | options))
