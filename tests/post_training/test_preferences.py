"""Pairs by execution, their batches, and DPO through the loop's eyes."""

import math

import pytest
import torch

from qwenlib.data.tasks import generate_tasks
from qwenlib.model import Qwen, QwenConfig
from qwenlib.post_training.answers import Answers
from qwenlib.post_training.completions import completion_batch, completion_logprobs
from qwenlib.post_training.preferences import (
    Pair,
    PairSampler,
    build_pairs,
    implicit_accuracy,
    pair_loss,
    summed_logprobs,
)

V, PAD = 23, 0
TASKS = generate_tasks(3, 0)


def answers(completions, scores, finished=None, samples=6) -> Answers:
    count = len(completions) // samples
    texts = [" ".join(map(str, ids)) for ids in completions]
    return Answers(
        TASKS[:count], samples, [[1, 2, 3 + i] for i in range(count)], completions, texts, scores,
        finished or [True] * len(completions),
    )  # fmt: skip


R, W = [[5, 9], [6, 9], [7, 9]], [[10, 9], [11, 9], [12, 9]]  # three right, three wrong


def test_right_is_chosen_and_wrong_rejected():
    (pair,) = build_pairs(answers([W[0], R[0], W[1], W[1], R[0], R[1]], [0, 1, 0, 0, 1, 1]))
    assert pair == Pair(TASKS[0], [1, 2, 3], R[0], W[0])


def test_pairs_use_different_answers_as_long_as_there_are_some():
    got = build_pairs(answers(R + W, [1, 1, 1, 0, 0, 0]), per_task=3)
    assert len({tuple(p.chosen) for p in got}) == len({tuple(p.rejected) for p in got}) == 3
    more = build_pairs(answers(R + W, [1, 1, 1, 0, 0, 0]), per_task=99)
    assert len({(tuple(p.chosen), tuple(p.rejected)) for p in more}) == len(more) == 9
    assert more[:3] == got


def test_what_gives_no_pair():
    assert build_pairs(answers(R + R, [1] * 6)) == []
    assert build_pairs(answers(W + W, [0] * 6)) == []
    cut = answers(R + W, [1, 1, 1, 0, 0, 0], [True] * 3 + [False] * 3)
    assert build_pairs(cut) == []
    long = answers([[5] * 10] * 3 + [[6] * 4] * 3, [1, 1, 1, 0, 0, 0])
    assert build_pairs(long) == [] and build_pairs(long, max_length_ratio=2.5)
    short = answers([[5] * 4] * 3 + [[6] * 10] * 3, [1, 1, 1, 0, 0, 0])
    assert build_pairs(short) == []


def test_unusable_answers_do_not_exist():
    six = answers([R[0], W[0], W[1], R[1], W[2], R[2]], [1, 0, 0, 1, 0, 1])
    without = lambda *texts: lambda text: text not in texts  # noqa: E731
    assert build_pairs(six, min_pass_rate=0.6) == []
    # Two of the wrong answers leave: three of four are right.
    got = build_pairs(six, min_pass_rate=0.6, usable=without("10 9", "11 9"))
    assert [pair.rejected for pair in got] == [W[2]]
    assert build_pairs(six, usable=lambda text: False) == []


def test_each_task_keeps_to_its_own_answers():
    got = build_pairs(answers(R + W + W + R, [1, 1, 1, 0, 0, 0] + [0, 0, 0, 1, 1, 1]))
    assert [p.task for p in got] == TASKS[:2]
    assert [p.prompt for p in got] == [[1, 2, 3], [1, 2, 4]]


def model(seed=0) -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    return Qwen(shape).initialise(seed)


def pairs(count=7) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def ids():
        length = int(torch.randint(1, 6, (1,), generator=generator))
        return torch.randint(0, V, (length,), generator=generator).tolist()

    return [Pair(TASKS[0], ids(), ids(), ids()) for _ in range(count)]


@torch.no_grad()
def naive_logprob(net, prompt, completion):
    logp = net(torch.tensor([[*prompt, *completion]]))[0].log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(completion))


def test_completion_rows_by_hand():
    batch = completion_batch([[1, 2], [3]], [[4], [5, 6, 7]], pad_id=9)
    assert batch.input_ids_NT.tolist() == [[1, 2, 4, 9], [3, 5, 6, 7]]
    assert batch.labels_NT.tolist() == [[-100, -100, 4, -100], [-100, 5, 6, 7]]
    with pytest.raises(ValueError, match="completion 1 is empty"):
        completion_batch([[1], [2]], [[3], []], 0)


def test_logprobs_equal_each_answer_alone():
    net = model()
    got = summed_logprobs(net, pairs(), PAD, batch_size=3)
    want = [[naive_logprob(net, p.prompt, c) for c in (p.chosen, p.rejected)] for p in pairs()]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_batches_are_a_function_of_the_step_with_matching_reference():
    reference = summed_logprobs(model(), pairs(), PAD)
    one = PairSampler(pairs(), reference, 2, PAD, seed=0)
    assert one.steps_per_epoch == 3
    seen = set()
    for step in range(3):
        batch = one.batch(step)
        assert torch.equal(batch.reference_2B, one.batch(step).reference_2B)
        with torch.no_grad():
            policy = completion_logprobs(model(), batch.rows)[0].sum(-1)
        torch.testing.assert_close(policy, batch.reference_2B, atol=1e-5, rtol=1e-5)
        seen |= set(batch.reference_2B.tolist())
    assert len(seen) == 12, "an epoch uses a pair once"
    with pytest.raises(ValueError, match="fewer than one batch of 8"):
        PairSampler(pairs(), reference, 8, PAD, 0)
    with pytest.raises(ValueError, match="6 reference rows for 7 pairs"):
        PairSampler(pairs(), reference[:6], 2, PAD, 0)


def test_loss_starts_at_ln_2_and_its_gradient_prefers_the_chosen():
    net = model()
    reference = summed_logprobs(net, pairs(), PAD)
    batch = PairSampler(pairs(), reference, 7, PAD, 0).batch(0)
    loss, count, _ = pair_loss(0.1)(net, batch)
    assert int(count) == 7
    assert loss.item() / 7 == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.02 * parameter.grad
    policy = summed_logprobs(net, pairs(), PAD)
    assert implicit_accuracy(policy, reference) > 0.8
    assert implicit_accuracy(reference, reference) == 0.5


def test_micro_batches_add_up():
    net, other = model(), model(1)
    reference = summed_logprobs(other, pairs(), PAD)
    whole = pair_loss(0.5)(net, PairSampler(pairs(), reference, 7, PAD, 0).batch(0))
    parts = [
        pair_loss(0.5)(net, PairSampler(pairs()[a:b], reference[a:b], b - a, PAD, 0).batch(0))
        for a, b in ((0, 2), (2, 7))
    ]
    assert sum(p[0].item() for p in parts) == pytest.approx(whole[0].item(), rel=1e-5)
    assert sum(int(p[1]) for p in parts) == int(whole[1]) == 7
