"""GRPO against hand-worked numbers, naive loops, exact KL gradients and invariances."""

import math

import pytest
import torch

from qwenlib.post_training.grpo import (
    completion_mask,
    group_advantages,
    group_variance,
    grpo_loss,
)


def case(seed=0, N=6, T=5):
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(N, T, generator=generator) * 3
    old = logp + 0.4 * torch.randn(N, T, generator=generator)
    ref = logp + 0.4 * torch.randn(N, T, generator=generator)
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    return logp, old, torch.randn(N, generator=generator), mask, ref


# --- masks ---


def test_completion_mask_keeps_the_first_stop_token():
    ids = torch.tensor([[4, 5, 9, 9, 9], [9, 4, 4, 4, 4], [4, 5, 6, 7, 8], [4, 7, 9, 0, 0]])
    want = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert completion_mask(ids, 9).int().tolist() == want
    assert completion_mask(ids, [9, 7])[3].int().tolist() == [1, 1, 0, 0, 0]


# --- advantages ---


def test_advantages_by_hand():
    one_in_eight = torch.tensor([1.0] + [0.0] * 7)
    got = group_advantages(one_in_eight, 8)
    assert got[0].item() == pytest.approx(2.474, abs=1e-3)
    assert got[1].item() == pytest.approx(-0.353, abs=1e-3)
    half = group_advantages(torch.tensor([1.0] * 4 + [0.0] * 4), 8)
    assert half[0].item() == pytest.approx(0.935, abs=1e-3)
    assert group_advantages(one_in_eight, 8, scale="none")[0].item() == pytest.approx(0.875)
    assert group_advantages(one_in_eight, 8, estimator="rloo")[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_advantages_equal_a_naive_loop(scale, estimator):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(5))
    want = []
    for q in range(3):
        group = rewards[4 * q : 4 * q + 4]
        for i in range(4):
            others = torch.cat([group[:i], group[i + 1 :]])
            base = group.mean() if estimator == "grpo" else others.mean()
            spread = {"std": group.std(), "none": 1.0, "batch": rewards.std()}[scale]
            want.append((group[i] - base) / (spread + (0 if scale == "none" else 1e-4)))
    torch.testing.assert_close(group_advantages(rewards, 4, scale, estimator), torch.stack(want))


def test_advantage_invariances():
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(6))
    shift = torch.arange(4.0).repeat_interleave(4) * 3  # any constant per query
    base = group_advantages(rewards, 4, eps=0.0)
    torch.testing.assert_close(group_advantages(rewards + shift, 4, eps=0.0), base)
    torch.testing.assert_close(group_advantages(rewards * 7, 4, eps=0.0), base)
    torch.testing.assert_close(base.view(4, 4).sum(-1), torch.zeros(4), atol=1e-5, rtol=0)
    order = torch.randperm(4)
    permuted = group_advantages(rewards.view(4, 4)[:, order].reshape(-1), 4, eps=0.0)
    torch.testing.assert_close(permuted, base.view(4, 4)[:, order].reshape(-1))


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_group_of_one_and_equal_rewards_teach_exactly_nothing(scale):
    assert torch.equal(group_advantages(torch.tensor([3.0, 5.0]), 1, scale), torch.zeros(2))
    assert torch.equal(group_advantages(torch.tensor([3.0]), 1, scale), torch.zeros(1))
    equal = torch.full((7,), 0.1)  # the fp32 mean of seven 0.1 is not 0.1
    assert torch.equal(group_advantages(equal, 7, scale), torch.zeros(7))


def test_an_unscored_completion_gets_zero_and_leaves_the_mean():
    rewards = torch.tensor([1.0, math.nan, 0.0, 0.0])
    got = group_advantages(rewards, 4)
    kept = group_advantages(rewards[[0, 2, 3]], 3)
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2, 3]], kept)
    assert torch.equal(group_advantages(torch.tensor([math.nan] * 2), 2), torch.zeros(2))
    assert torch.equal(group_advantages(torch.tensor([math.nan, 1.0]), 2), torch.zeros(2))


def test_group_variance():
    got = group_variance(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), 4)
    torch.testing.assert_close(got, torch.tensor([0.25, 1 / 3]))
    assert torch.equal(group_variance(torch.tensor([2.0, 3.0]), 1), torch.zeros(2))


# --- loss ---


def naive(logp, old, advantages, mask, low, high, aggregate, denominator):
    total, count = 0.0, 0
    for i in range(len(logp)):
        row = []
        for t in range(logp.shape[1]):
            if mask[i, t]:
                ratio = math.exp(logp[i, t] - old[i, t])
                a = advantages[i].item()
                row.append(-min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a))
        if aggregate == "sequence":
            total, count = total + sum(row) / len(row), count + 1
        elif aggregate == "token":
            total, count = total + sum(row), count + len(row)
        else:
            total, count = total + sum(row) / denominator, count + 1
    return total, count


@pytest.mark.parametrize(("aggregate", "denominator"), [("sequence", None), ("token", None),
                                                        ("constant", 5)])  # fmt: skip
def test_loss_equals_a_naive_loop(aggregate, denominator):
    logp, old, advantages, mask, _ = case(1)
    loss, count, _ = grpo_loss(
        logp, old, advantages, mask, clip_low=0.2, clip_high=0.28, aggregate=aggregate,
        denominator=denominator,
    )  # fmt: skip
    want, n = naive(logp, old, advantages, mask, 0.2, 0.28, aggregate, denominator)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert count == n


def test_clipping_by_hand():
    def run(ratio, advantage):
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, _, stats = grpo_loss(
            logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1)
        )
        loss.backward()
        return loss.item(), logp.grad.item(), stats["clip/low"].item(), stats["clip/high"].item()

    assert run(1.5, 1.0) == pytest.approx((-1.2, 0.0, 0, 1))  # good enough already: no gradient
    assert run(1.5, -1.0) == pytest.approx((1.5, 1.5, 0, 0))  # bad and likelier: full gradient
    assert run(0.5, 1.0) == pytest.approx((-0.5, -0.5, 0, 0))
    assert run(0.5, -1.0) == pytest.approx((0.8, 0.0, 1, 0))
    assert run(1.1, 1.0) == pytest.approx((-1.1, -1.1, 0, 0))


def test_on_policy_the_sequence_loss_is_zero_with_a_gradient():
    """Complete groups: Σ A = 0, so the value says nothing; the gradient is -A / T_i."""
    logp, _, _, mask, _ = case(2)
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), 3)
    logp.requires_grad_()
    loss, count, stats = grpo_loss(logp, None, advantages, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert count == 6 and stats["ratio"].item() == 1
    want = torch.where(mask, -advantages[:, None] / mask.sum(-1, keepdim=True), 0.0)
    torch.testing.assert_close(logp.grad, want)


def test_micro_batches_add_up():
    logp, old, advantages, mask, ref = case(3)
    for aggregate, denominator in (("sequence", None), ("token", None), ("constant", 5)):
        options = {"kl": "k3", "kl_coef": 0.1, "aggregate": aggregate, "denominator": denominator}
        whole = grpo_loss(logp, old, advantages, mask, ref, **options)
        rows = [slice(0, 1), slice(1, 6)]
        parts = [
            grpo_loss(logp[r], old[r], advantages[r], mask[r], ref[r], **options) for r in rows
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        assert sum(p[1] for p in parts) == whole[1]


def test_padding_counts_nowhere():
    """Columns of padding with any content, NaN and inf included, change no value or gradient."""
    logp, old, advantages, mask, ref = case(4)
    pad = torch.tensor([math.nan, math.inf, -math.inf]).expand(6, 3)
    for aggregate, denominator in (("sequence", None), ("token", None), ("constant", 5)):
        options = {"kl": "k3+", "kl_coef": 0.1, "aggregate": aggregate, "denominator": denominator}
        short, long = logp.clone().requires_grad_(), torch.cat([logp, pad], 1).requires_grad_()
        one = grpo_loss(short, old, advantages, mask, ref, **options)
        two = grpo_loss(
            long, torch.cat([old, -pad], 1), advantages,
            torch.cat([mask, torch.zeros(6, 3, dtype=torch.bool)], 1),
            torch.cat([ref, pad], 1), **options,
        )  # fmt: skip
        one[0].backward()
        two[0].backward()
        torch.testing.assert_close(one[0], two[0])
        assert one[1] == two[1]
        torch.testing.assert_close(long.grad[:, :5], short.grad)
        assert torch.equal(long.grad[:, 5:], torch.zeros(6, 3))
        for key in one[2]:
            torch.testing.assert_close(one[2][key], two[2][key])


def test_a_row_without_tokens_is_zero_not_nan():
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    loss, count, _ = grpo_loss(logp, None, torch.tensor([1.0, 1.0]), mask)
    loss.backward()
    assert loss.item() == pytest.approx(-1) and count == 2
    assert logp.grad.isfinite().all()


def test_old_reference_and_advantages_get_no_gradient():
    logp, old, advantages, mask, ref = case(5)
    leaves = [x.requires_grad_() for x in (logp, old, advantages, ref)]
    grpo_loss(logp, old, advantages, mask, ref, kl="k3", kl_coef=0.1)[0].backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


def test_kl_estimators_by_enumeration():
    """Exact expectations over six actions: value and gradient of each estimator on policy."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).float().requires_grad_()
    ref = torch.randn(6, generator=generator).log_softmax(-1)
    policy = logits.log_softmax(-1)
    reverse = (policy.exp() * (policy - ref)).sum()
    forward = (ref.exp() * (ref - policy)).sum()
    gradients = {
        "reverse": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
        "forward": torch.autograd.grad(forward, logits, retain_graph=True)[0],
        "zero": torch.zeros(6),
    }
    want = {"k1": "zero", "k2": "reverse", "k3": "forward", "k3+": "reverse"}
    for kl, expected in want.items():
        value, gradient = 0.0, torch.zeros(6)
        for action in range(6):  # E[·] with the sampling probability held fixed
            weight = policy[action].exp().item()
            loss, _, _ = grpo_loss(
                policy[action].view(1, 1), None, torch.zeros(1), torch.ones(1, 1),
                ref[action].view(1, 1), kl=kl, kl_coef=1.0,
            )  # fmt: skip
            value += weight * loss.item()
            gradient += weight * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient, gradients[expected], atol=1e-5, rtol=1e-4)
        if kl != "k2":
            assert value == pytest.approx(reverse.item(), abs=1e-5)


def test_a_three_armed_bandit_converges_to_the_best_arm():
    torch.manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    payoff = torch.tensor([0.1, 0.5, 0.9])
    for _ in range(150):
        arms = torch.multinomial(logits.detach().softmax(-1), 8, replacement=True)
        advantages = group_advantages(payoff[arms], 8, scale="none")
        logp = logits.log_softmax(-1)[arms].unsqueeze(-1)
        loss, count, _ = grpo_loss(logp, None, advantages, torch.ones(8, 1))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert logits.softmax(-1)[2].item() > 0.9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kl": "k4"}, "k4"),
        ({"kl": "k3"}, "ref_logp_NT"),
        ({"aggregate": "mean"}, "mean"),
        ({"aggregate": "constant"}, "denominator"),
        ({"denominator": 4}, "denominator"),
    ],
)
def test_bad_arguments_are_named(change, match):
    logp, old, advantages, mask, _ = case()
    with pytest.raises(ValueError, match=match):
        grpo_loss(logp, old, advantages, mask, **change)


def test_bad_groups_are_named():
    with pytest.raises(ValueError, match="groups of 4"):
        group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="estimator"):
        group_advantages(torch.zeros(4), 4, estimator="ppo")
