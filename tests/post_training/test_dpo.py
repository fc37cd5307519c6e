"""DPO against hand-worked numbers, a naive loop, and invariances."""

import math

import pytest
import torch

from qwenlib.post_training.dpo import dpo_loss
from qwenlib.post_training.sft import labels_from_mask, sequence_logprobs


def pairs(seed=0, B=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, generator=generator) * 5 - 20 for _ in range(4)]


def test_start_is_ln_2_with_gradient_minus_half_beta_over_b():
    chosen, rejected, _, _ = pairs()
    policy_chosen = chosen.clone().requires_grad_()
    policy_rejected = rejected.clone().requires_grad_()
    loss, stats = dpo_loss(policy_chosen, policy_rejected, chosen, rejected, beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    torch.testing.assert_close(policy_chosen.grad, torch.full((5,), -0.1 / 2 / 5))
    torch.testing.assert_close(policy_rejected.grad, torch.full((5,), 0.1 / 2 / 5))
    assert stats["rewards/accuracies"].item() == 0.5  # all ties
    assert stats["rewards/margins"].item() == 0


def test_hand_worked_numbers():
    # Δ = (-10 - -11) - (-12 - -11) = 2
    values = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)]
    loss, stats = dpo_loss(*values, beta=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.2)), abs=1e-6)
    assert loss.item() == pytest.approx(0.598139, abs=1e-6)
    smoothed = 0.75 * math.log1p(math.exp(-0.2)) + 0.25 * math.log1p(math.exp(0.2))
    got = dpo_loss(*values, beta=0.1, label_smoothing=0.25)[0]
    assert got.item() == pytest.approx(smoothed, abs=1e-6)
    robust = (0.75 * math.log1p(math.exp(-0.2)) - 0.25 * math.log1p(math.exp(0.2))) / 0.5
    got = dpo_loss(*values, beta=0.1, label_smoothing=0.25, variant="robust")[0]
    assert got.item() == pytest.approx(robust, abs=1e-6)
    assert dpo_loss(*values, beta=0.1, variant="ipo")[0].item() == pytest.approx(9.0, abs=1e-5)
    assert stats["rewards/chosen"].item() == pytest.approx(0.1)
    assert stats["rewards/rejected"].item() == pytest.approx(-0.1)
    assert stats["rewards/margins"].item() == pytest.approx(0.2)
    assert stats["logps/chosen"].item() == -10
    assert stats["logps/rejected"].item() == -12


def test_naive_loop():
    pc, pr, rc, rr = pairs(1)
    total = wins = 0.0
    for i in range(5):
        delta = (pc[i] - rc[i] - pr[i] + rr[i]).item()
        total += math.log1p(math.exp(-0.3 * delta))
        wins += delta > 0
    loss, stats = dpo_loss(pc, pr, rc, rr, beta=0.3)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    assert stats["rewards/accuracies"].item() == pytest.approx(wins / 5)


def test_a_shift_of_both_answers_changes_nothing():
    """A prompt's own log-probability, or any reward shift per prompt, cancels in Δ."""
    pc, pr, rc, rr = pairs(2)
    shift = torch.arange(5.0)
    torch.testing.assert_close(
        dpo_loss(pc + shift, pr + shift, rc, rr)[0], dpo_loss(pc, pr, rc, rr)[0]
    )
    torch.testing.assert_close(
        dpo_loss(pc, pr, rc + shift, rr + shift)[0], dpo_loss(pc, pr, rc, rr)[0]
    )


def test_swapping_the_answers_flips_margin_and_accuracy():
    pc, pr, rc, rr = pairs(3)
    _, one = dpo_loss(pc, pr, rc, rr)
    _, two = dpo_loss(pr, pc, rr, rc)
    torch.testing.assert_close(one["rewards/margins"], -two["rewards/margins"])
    assert one["rewards/accuracies"].item() + two["rewards/accuracies"].item() == pytest.approx(1)


def test_reference_gets_no_gradient():
    values = [x.requires_grad_() for x in pairs(4)]
    dpo_loss(*values)[0].backward()
    assert values[0].grad is not None and values[1].grad is not None
    assert values[2].grad is None and values[3].grad is None


def test_log_probs_are_summed_over_targets_and_padding_does_not_count():
    """Twice the tokens of equal log-ratio are twice the reward; longer padding is no token."""
    V = 4
    tilt = torch.zeros(1, 9, V)
    tilt[..., 1] = 1.0  # the policy prefers token 1 by a constant log-ratio
    gain = (torch.log_softmax(tilt[0, 0], -1)[1] - math.log(1 / V)).item()
    ids = torch.ones(1, 9, dtype=torch.long)

    def reward(length):
        mask = torch.zeros(1, 9)
        mask[:, 1 : 1 + length] = 1
        labels = labels_from_mask(ids, mask)
        policy = sequence_logprobs(tilt, labels)[0].sum(-1)
        reference = sequence_logprobs(torch.zeros(1, 9, V), labels)[0].sum(-1)
        _, stats = dpo_loss(policy, reference, reference, reference, beta=0.1)
        return stats["rewards/chosen"].item()

    assert reward(2) == pytest.approx(0.1 * 2 * gain, rel=1e-5)
    assert reward(6) == pytest.approx(0.1 * 6 * gain, rel=1e-5)


def test_a_vast_difference_stays_finite():
    values = [torch.tensor([x], requires_grad=True) for x in (-1e4, 0.0, 0.0, -1e4)]
    loss, _ = dpo_loss(*values, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert values[0].grad.item() == pytest.approx(-1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"beta": 0.0}, "beta"),
        ({"variant": "hinge"}, "hinge"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_bad_arguments_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        dpo_loss(*pairs(), **change)


def test_unequal_shapes_are_named():
    pc, pr, rc, rr = pairs()
    with pytest.raises(ValueError, match="shape"):
        dpo_loss(pc, pr[:2], rc, rr)
