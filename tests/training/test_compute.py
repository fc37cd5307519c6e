"""Compiled blocks: the same losses, the same model afterwards, eager evaluations."""

import pytest
import torch

from qwenlib.model import MoEConfig, Qwen
from qwenlib.training import next_token_loss, train
from qwenlib.training.compute import compiled
from tests.training.test_loop import batch, model, settings

MIXTURE = MoEConfig(6, 2, 20, 28)


@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_every_block_is_compiled_and_let_go(moe, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(self))
    net = Qwen(model().config.replace(moe=moe))
    with compiled(net, False):
        assert asked == []
    with compiled(net, True):
        whole = [part for layer in net.model.layers for part in (
            [layer] if moe is None else [layer.self_attn, layer.mlp.shared_expert]
        )]  # fmt: skip
        assert asked == whole
    asked.clear()
    other = torch.nn.Linear(2, 2)
    with compiled(other, True):
        assert asked == [other]


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, MIXTURE])
def test_compiled_training_equals_plain_training(moe):
    calls = []

    def go(**changes):
        net = Qwen(model().config.replace(moe=moe)).initialise(0)

        def evaluate(net):
            calls.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            with torch.no_grad():
                loss, count, _ = next_token_loss(net, batch(0))
            calls.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return {"loss": float(loss / count)}

        return train(
            net, lambda step: [batch(0).rows(0, 4), batch(0).rows(4, 6)], next_token_loss,
            settings(max_steps=5, eval_every=2, **changes), evaluate=evaluate, show_progress=False,
        )  # fmt: skip

    plain = go()
    assert calls[-1] == 0
    fast = go(compile=True)
    assert calls[-1] > 0, "something was compiled"
    before, after = calls[::2], calls[1::2]
    assert before == after, "nothing was compiled for an evaluation"
    want = [row["loss"] for row in plain.history]
    assert [row["loss"] for row in fast.history] == pytest.approx(want, abs=1e-5)
    for a, b in zip(plain.evaluations, fast.evaluations, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert fast.model.state_dict().keys() == plain.model.state_dict().keys()
    assert all(part._compiled_call_impl is None for part in fast.model.modules())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
