"""The loop: micro-batches, clipping, and what it refuses."""

import dataclasses
import math

import pytest
import torch

from qwenlib.data.packing import pack_rows
from qwenlib.model import Qwen, QwenConfig
from qwenlib.training import TrainConfig, next_token_loss, train
from qwenlib.training.optim import adamw

V = 61


def model() -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_theta=10_000.0,
    )  # fmt: skip
    return Qwen(shape).initialise(0)


def batch(step: int):
    """Eight rows of counting sequences of unequal length: f(step) and learnable."""
    generator = torch.Generator().manual_seed(step)
    docs = []
    for _ in range(10):
        start, stride, length = torch.randint(1, 40, (3,), generator=generator).tolist()
        docs.append(([(start + stride % 3 * i) % V for i in range(length + 2)], None))
    return pack_rows(docs, 42, pad_id=0)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"max_steps": 4, "learning_rate": 1e-2, **changes})


def run(split=1, net=None, **changes):
    def batches(step):
        whole = batch(step)
        rows = len(whole.input_ids_BT)
        edges = [rows * i // split for i in range(split + 1)]
        return [whole.rows(a, b) for a, b in zip(edges, edges[1:]) if b > a]

    return train(net or model(), batches, next_token_loss, settings(**changes))


@pytest.mark.parametrize("split", [2, 3])
def test_a_run_in_micro_batches_equals_one_in_batches(split):
    """20 steps of AdamW: losses to 1e-6 of their size, weights to 1e-5."""
    one, many = run(max_steps=20), run(split, max_steps=20)
    for a, b in zip(one.history, many.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["count"] == a["count"]
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", [2, 3])
def test_micro_batches_equal_one_batch(split):
    """One SGD step without clipping: the weights differ by the gradients' rounding alone."""
    results = []
    for parts in (1, split):
        net = model()
        whole = batch(0)
        edges = [len(whole.input_ids_BT) * i // parts for i in range(parts + 1)]
        pieces = [whole.rows(a, b) for a, b in zip(edges, edges[1:])]
        counts = [piece.num_targets for piece in pieces]
        assert parts == 1 or len(set(counts)) > 1, "unequal parts, or the test shows nothing"
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        results.append(
            train(
                net, lambda _, pieces=pieces: pieces, next_token_loss,
                settings(max_steps=1, grad_clip=0.0), optimizer=optimizer,
            )
        )  # fmt: skip
    one, many = results
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert one.history[0]["loss"] == pytest.approx(many.history[0]["loss"], abs=1e-6)
    assert one.history[0]["grad_norm"] == pytest.approx(many.history[0]["grad_norm"], abs=1e-6)
    assert one.tokens == many.tokens == batch(0).num_targets


def test_gradient_is_clipped_to_the_norm():
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    train(net, lambda step: [batch(step)], next_token_loss,
          settings(max_steps=1, learning_rate=1.0, grad_clip=0.01),
          optimizer=torch.optim.SGD(net.parameters(), lr=1.0))  # fmt: skip
    moved = sum((p - q).square().sum() for p, q in zip(net.parameters(), before)).sqrt()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_history_log_and_schedule():
    logged = []
    result = train(
        model(), lambda step: [batch(step)], next_token_loss,
        settings(max_steps=5, learning_rate=3e-3, eval_every=2, warmup_share=0.4,
                 schedule="linear"),
        log=lambda row, step: logged.append((step, row)),
        evaluate=lambda net: {"mode": float(net.training)},
    )  # fmt: skip
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in result.history] == pytest.approx(
        [1.5e-3, 3e-3, 3e-3, 1.65e-3, 3e-4]
    )
    assert [row["step"] for row in result.evaluations] == [0, 2, 4, 5]
    assert [step for step, row in logged if "loss" in row] == [1, 2, 3, 4, 5]
    assert [step for step, row in logged if "eval/mode" in row] == [2, 4, 5]
    assert not result.model.training


def test_stats_are_weighted_by_the_counts():
    def loss_fn(net, value):
        loss = net.weight.sum() * value
        return loss, torch.tensor(value), {"value": torch.tensor(float(value))}

    net = torch.nn.Linear(1, 1, bias=False)
    row = train(net, lambda _: [1, 3], loss_fn, settings(max_steps=1)).history[0]
    assert row["count"] == 4 and row["value"] == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert row["grad_norm"] == pytest.approx(1.0)  # (1 + 3) / 4


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named(poison):
    def loss_fn(net, step):
        loss = net.weight.sum()
        if step == 2:
            root = (loss - loss.detach()).abs().sqrt()  # 0, with an infinite slope
            loss = loss * math.nan if poison == "loss" else loss + root
        return loss, 1, {}

    net = torch.nn.Linear(2, 2)
    with pytest.raises(FloatingPointError, match="step 3: loss"):
        train(net, lambda step: [step], loss_fn, settings())
    assert all(p.isfinite().all() for p in net.parameters()), "the bad step moved nothing"


def test_a_step_without_labels_moves_nothing():
    def loss_fn(net, _):
        return 0.0 * net.weight.sum(), 0, {}

    net = torch.nn.Linear(2, 2)
    before = net.weight.detach().clone()
    result = train(net, lambda _: [0], loss_fn, settings(max_steps=2, weight_decay=0.5))
    assert torch.equal(net.weight, before) and result.history[0]["loss"] == 0.0


def test_decay_touches_matrices_only():
    net = model()
    optimizer = adamw(net, 1.0, (0.9, 0.95), 1e-8, weight_decay=0.25)
    for parameter in net.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        assert (parameter == (0.75 if parameter.dim() == 2 else 1.0)).all(), name


def test_autocast_keeps_fp32_weights_and_learns():
    result = run(max_steps=8, autocast="bfloat16")
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"autocast": "float16"}, "autocast"),
        ({"on_bad_step": "skp"}, "on_bad_step 'skp'.*did you mean 'skip'"),
        ({"spike_factor": 0.5}, "spike_factor must be 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"decay_share": 0.0}, "decay_share"),
        ({"warmup_share": 1.5}, "warmup_share must be between 0 and 1"),
        ({"save_every": -1}, "save_every must be at least 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_last_part_of_wsd_is_as_long_as_asked():
    rates = [
        [r["lr"] for r in run(max_steps=10, schedule="wsd", decay_share=share).history]
        for share in (0.2, 0.5)
    ]
    assert rates[0] == [r["lr"] for r in run(max_steps=10, schedule="wsd").history]
    assert [sum(r == 1e-2 for r in part) for part in rates] == [8, 6]
    assert rates[0][-1] == rates[1][-1] == pytest.approx(1e-3)


def test_settings_of_a_saved_run_are_compared_by_name():
    saved = dataclasses.asdict(settings(max_steps=5, on_bad_step="skip"))
    assert settings(max_steps=5, workers=3).differences(saved) == []
    assert settings(grad_clip=2.0).differences(saved) == ["grad_clip", "max_steps"]
    del saved["decay_share"]  # written before there was such a setting
    assert settings(max_steps=5).differences(saved) == []
    assert settings(max_steps=5, decay_share=0.5).differences(saved) == ["decay_share"]


def test_auto_compute_dtype_follows_the_hardware(monkeypatch):
    from qwenlib.training import config

    cpu = torch.device("cpu")
    for fast, want in ((True, "bfloat16"), (False, "none")):
        monkeypatch.setattr(config, "fast_bfloat16", lambda device, fast=fast: fast)
        assert settings(autocast="auto").resolved(cpu).autocast == want
        one, two = run(max_steps=3, autocast="auto"), run(max_steps=3, autocast=want)
        assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    assert settings(autocast="none").resolved(cpu).autocast == "none"
    with pytest.raises(ValueError, match="auto"):
        settings(autocast="fp8")


def test_bf16_compute_trains_like_fp32_with_fp32_weights():
    plain, mixed = run(max_steps=20), run(max_steps=20, autocast="bfloat16")
    a, b = ([row["loss"] for row in result.history] for result in (plain, mixed))
    assert a != b, "autocast did nothing"
    assert b == pytest.approx(a, rel=0.03)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
