"""Compiled blocks: the same losses, the same model afterwards, eager evaluations."""

import pytest
import torch

from qwenlib.model import MoEConfig, Qwen
from qwenlib.training import next_token_loss, train
from qwenlib.training.compute import checkpointed, compiled
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


def test_checkpointed_blocks_change_no_bit_and_are_let_go():
    """The model's own setting comes back; while training its blocks run once more each."""
    runs = {}
    for kind in ("none", "full"):
        seen = []

        def count(module, inputs, seen=seen):
            seen.append(module.training)

        net = model()
        for block in net.model.layers:
            block.mlp.register_forward_pre_hook(count)
        runs[kind] = train(
            net, lambda step: [batch(step)], next_token_loss,
            settings(max_steps=3, activation_checkpointing=kind), show_progress=False,
        )  # fmt: skip
        assert len(seen) == 3 * 2 * (2 if kind == "full" else 1)
        assert net.gradient_checkpointing is False
    for a, b in zip(*(r.model.parameters() for r in runs.values()), strict=True):
        assert torch.equal(a, b)
    net = model()
    net.gradient_checkpointing = True
    with checkpointed(net, "none"):
        assert net.gradient_checkpointing, "the caller's own choice stands"
    with pytest.raises(ValueError, match="Linear has no attribute gradient_checkpointing"):
        with checkpointed(torch.nn.Linear(2, 2), "full"):
            pass


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
