"""Online merging against torch's AdamW, hand-worked TIES, and its own restarts."""

import copy
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from qwenlib.model import Qwen, QwenConfig, save_pretrained
from qwenlib.post_training.online_merging import (
    OnlineMergingAdamW,
    check_base,
    merge_ondare,
    merge_onties,
    task_vectors,
)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean() + model(x)[:, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make(model, **options):
    base = {k: v - 0.01 * torch.ones_like(v) for k, v in model.state_dict().items()}
    tau = task_vectors(model, {k: v.clone() for k, v in model.state_dict().items()}, base)
    return OnlineMergingAdamW(model.parameters(), tau, **{"lr": 1e-2, **options})


def equal_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("variant", ["ondare", "onties"])
def test_alpha_0_p_1_is_adamw_bit_for_bit(variant):
    ours, theirs = network(), network()
    options = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}  # eps that shows its place
    optimizer = make(ours, alpha=0.0, p=1.0, variant=variant, **options)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, **options)
    train(ours, optimizer, 12)
    train(theirs, reference, 12)
    assert equal_weights(ours, theirs)


@pytest.mark.parametrize("every", [2, 3, 5])
def test_k_step_with_alpha_0_p_1_is_plain_adamw(every):
    ours, theirs = network(), network()
    optimizer = make(ours, alpha=0.0, p=1.0, every=every, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(11):  # every step, merging or not, must move every parameter
        train(ours, optimizer, 1, start=step)
        train(theirs, reference, 1, start=step)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_k_step_returns_dropped_entries_to_the_window_start():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model, alpha=0.0, p=0.3, every=4)
    train(model, optimizer, 3)
    assert all((a != b).float().mean() > 0.9 for a, b in zip(start, model.parameters()))
    train(model, optimizer, 1, start=3)
    same = torch.cat([(a == b).flatten() for a, b in zip(start, model.parameters())])
    assert 0.5 < same.float().mean() < 0.85  # about 1 - p went back, bit for bit


def test_onties_four_elements_by_hand():
    delta, tau = torch.tensor([4.0, -3.0, 2.0, 1.0]), torch.tensor([2.0, 5.0, -1.0, -6.0])
    got = merge_onties(delta, tau, alpha=0.5, p=0.75)
    assert got.tolist() == [3.0, 2.5, 1.0, -3.0]
    # No trimming: (2, -1.5, 1, 0.5) ⊕ (1, 2.5, -0.5, -3)
    assert merge_onties(delta, tau, alpha=0.5, p=1.0).tolist() == [3.0, 2.5, 1.0, -3.0]
    # α = 0.1, p = ½: (3.6, -2.7, 0, 0) ⊕ (0, 0.5, 0, -0.6)
    got = merge_onties(delta, tau, alpha=0.1, p=0.5)
    torch.testing.assert_close(got, torch.tensor([3.6, -2.7, 0.0, -0.6]))


def test_onties_keeps_at_least_one_entry_and_tiny_signs():
    delta, tau = torch.tensor([1.0, 3.0, 2.0]), torch.zeros(3)
    assert merge_onties(delta, tau, alpha=0.0, p=0.01).tolist() == [0.0, 3.0, 0.0]
    tiny = torch.tensor([1e-30])  # the product of both would underflow to zero
    got = merge_onties(tiny, -3 * tiny, alpha=0.5, p=1.0)
    torch.testing.assert_close(got, torch.tensor([-1.5e-30]), rtol=1e-5, atol=0)


def test_ondare_is_unbiased_over_masks():
    delta, tau = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 1.0, -4.0])
    generator = torch.Generator().manual_seed(0)
    for rescale, factor in ((True, 1.0), (False, 0.25)):
        draws = torch.stack(
            [merge_ondare(delta, tau, 0.2, 0.25, generator, rescale) for _ in range(10_000)]
        )
        want = factor * (0.8 * delta + 0.2 * tau)
        z = (draws.mean(0) - want) / (draws.std(0) / 100)
        assert z.abs().max() < 4


def test_ondare_masks_of_delta_and_tau_are_independent():
    ones = torch.ones(40_000)
    generator = torch.Generator().manual_seed(1)
    merged = merge_ondare(ones, 10 * ones, 0.5, 0.5, generator, rescale=False)
    shares = [(merged == value).float().mean().item() for value in (0.0, 0.5, 5.0, 5.5)]
    assert shares == pytest.approx([0.25] * 4, abs=0.02)


def test_alpha_pulls_along_the_task_vector_and_zero_lr_does_not_move():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model, alpha=1.0, p=1.0)
    train(model, optimizer, 3)
    for a, b in zip(start, model.parameters()):
        torch.testing.assert_close(b - a, torch.full_like(a, 0.03), rtol=1e-4, atol=1e-6)
    before = copy.deepcopy(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    assert equal_weights(before, model)


@pytest.mark.parametrize(("variant", "every"), [("ondare", 1), ("ondare", 3), ("onties", 3)])
def test_resume_is_bit_exact(tmp_path, variant, every):
    options = {
        "alpha": 1e-3,
        "p": 0.3,
        "variant": variant,
        "every": every,
        "seed": 5,
        "weight_decay": 0.1,
    }
    straight = network()
    tau_source = {k: v.clone() for k, v in straight.state_dict().items()}
    base = {k: v - 0.01 for k, v in tau_source.items()}
    optimizer = OnlineMergingAdamW(
        straight.parameters(), task_vectors(straight, tau_source, base), lr=1e-2, **options
    )
    train(straight, optimizer, 4)
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()},
               tmp_path / "state.pt")  # fmt: skip
    train(straight, optimizer, 5, start=4)

    saved = torch.load(tmp_path / "state.pt")
    resumed = network(seed=99)
    resumed.load_state_dict(saved["model"])
    torch.manual_seed(1234)  # the global generator plays no part
    second = OnlineMergingAdamW(
        resumed.parameters(), task_vectors(resumed, tau_source, base), lr=5.0, **options
    )
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, 5, start=4)
    assert equal_weights(straight, resumed)


def test_masks_follow_seed_parameter_and_step():
    optimizer = make(network(), alpha=0.0, p=0.5)
    other = make(network(), alpha=0.0, p=0.5, seed=1)
    ones = torch.ones(64)
    first = optimizer.merge(ones, ones, 0, 1)
    assert torch.equal(first, optimizer.merge(ones, ones, 0, 1))
    assert not torch.equal(first, optimizer.merge(ones, ones, 1, 1))
    assert not torch.equal(first, optimizer.merge(ones, ones, 0, 2))
    assert not torch.equal(first, other.merge(ones, ones, 0, 1))


def test_a_parameter_without_gradient_does_not_shift_the_others_masks():
    one, two = network(), network()
    first, second = make(one, alpha=0.0, p=0.5), make(two, alpha=0.0, p=0.5)
    for model, optimizer, freeze in ((one, first, False), (two, second, True)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if freeze:
            model[0].weight.grad = None
        optimizer.step()
    assert torch.equal(one[2].weight, two[2].weight)
    assert torch.equal(two[0].weight, network()[0].weight)


def test_bf16_masters_are_refused():
    model = network().bfloat16()
    with pytest.raises(TypeError, match="fp32 master"):
        make(model)


def test_bad_input_is_named():
    model = network()
    with pytest.raises(ValueError, match="alpha"):
        make(model, p=0.0)
    with pytest.raises(ValueError, match="dare"):
        make(model, variant="dare")
    with pytest.raises(KeyError, match="no task vector"):
        OnlineMergingAdamW(model.parameters(), {})
    state = model.state_dict()
    with pytest.raises(KeyError, match="base model has no parameter"):
        task_vectors(model, state, {})
    with pytest.raises(ValueError, match="tuned model has shape"):
        task_vectors(model, {k: v[:1] for k, v in state.items()}, state)


def test_a_base_of_another_shape_is_named_with_its_first_tensor():
    shape = QwenConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip

    with TemporaryDirectory() as home:

        def folder(name, **changes):
            return save_pretrained(Qwen(shape.replace(**changes)), f"{home}/{name}")

        tuned = folder("tuned")
        check_base(tuned, folder("longer", rope_theta=1e6, tie_word_embeddings=False))
        wide, deep = folder("wide", intermediate_size=32), folder("deep", num_hidden_layers=3)
        gate = r"layers.0.mlp.gate_proj.weight is of shape \(32, 16\) there and of shape \(24, 16\)"
        with pytest.raises(ValueError, match=f"{wide} .*{gate} in {tuned}.*merge_base"):
            check_base(tuned, wide)
        with pytest.raises(ValueError, match=rf"layers.2.* there and missing in {tuned}"):
            check_base(tuned, deep)
        with pytest.raises(ValueError, match=rf"layers.2.* is missing there and of.* in {deep}"):
            check_base(deep, tuned)
