"""The moving average of the weights: by hand, inside an evaluation, and out again."""

import pytest
import torch

from qwenlib.training import next_token_loss, train
from qwenlib.training.averages import WeightAverage
from tests.training.test_loop import batch, model, settings


def test_by_hand():
    net = torch.nn.Linear(1, 1, bias=False).requires_grad_()
    values = [4.0, 1.0, -2.0, 8.0] + [3.0] * 40
    net.weight.data.fill_(values[0])
    average = WeightAverage(net, 0.75)
    want = values[0]
    for n, value in enumerate(values[1:], 1):
        net.weight.data.fill_(value)
        average.update(net)
        decay = min(0.75, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * value
        assert average.weights["weight"].item() == pytest.approx(want, rel=1e-6)
        if n == 1:
            assert want == pytest.approx(2 / 11 * 4 + 9 / 11 * 1), "the first weights fade at once"
    assert want == pytest.approx(3.0, abs=1e-3)


def test_the_model_has_it_inside_and_its_own_weights_after():
    net = model()
    average = WeightAverage(net, 0.9)
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    for value in average.weights.values():
        value.mul_(2)
    with pytest.raises(KeyError), average.in_place_of(net):
        assert all(torch.equal(p, 2 * own[name]) for name, p in net.named_parameters())
        raise KeyError("also when the evaluation fails")
    assert all(torch.equal(p, own[name]) for name, p in net.named_parameters())
    average.copy_to(net)
    assert all(torch.equal(p, 2 * own[name]) for name, p in net.named_parameters())


def test_kept_in_fp32_of_the_trained_parameters():
    net = model().bfloat16()
    net.model.norm.weight.requires_grad_(False)
    average = WeightAverage(net, 0.9999)
    assert "model.norm.weight" not in average.weights
    net.lm_head.weight.data.add_(1.0)
    before = average.weights["lm_head.weight"].clone()
    average.updates = 1_000_000
    average.update(net)
    step = average.weights["lm_head.weight"] - before
    torch.testing.assert_close(step, torch.full_like(step, 1e-4), rtol=0.05, atol=0)


def test_evaluations_are_of_the_average_and_training_is_not_changed():
    seen = []

    def evaluate(net):
        seen.append(net.lm_head.weight.detach().clone())
        return {"sum": net.lm_head.weight.sum().item()}

    def go(**changes):
        return train(
            model(), lambda step: [batch(step)], next_token_loss, settings(**changes),
            evaluate=evaluate, show_progress=False,
        )  # fmt: skip

    plain, averaged = go(), go(ema_decay=0.6)
    assert plain.average is None
    for a, b in zip(plain.model.parameters(), averaged.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(seen[0], seen[2]), "before the first step they are the same"
    assert torch.equal(seen[1], plain.model.lm_head.weight)
    assert torch.equal(seen[3], averaged.average.weights["lm_head.weight"])
    assert not torch.equal(seen[3], seen[1])
    assert averaged.average.updates == 4
