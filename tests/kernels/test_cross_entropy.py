"""Head and cross-entropy in one: against `F.cross_entropy`, in C and without."""

import functools

import pytest
import torch
import torch.nn.functional as F

from qwenlib.kernels import cross_entropy, linear_cross_entropy

D = 12


def both_ways(test):
    """Run a test through the C code and through PyTorch; the first must not fall back unseen."""

    @pytest.mark.parametrize("way", ["C", "PyTorch"])
    @functools.wraps(test)
    def run(way, **arguments):
        if way == "C" and cross_entropy._compiled() is None:
            pytest.skip("no C compiler")
        with pytest.MonkeyPatch.context() as patch:
            if way == "PyTorch":
                patch.setattr(cross_entropy, "_compiled", lambda: None)
            test(way, **arguments)

    return run


def draw(M, V, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, D, generator=generator, dtype=torch.float64)
    w = scale * D**-0.5 * torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (M,), generator=generator)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


def oracle(x, w, targets):
    """In fp64, from the same numbers."""
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    logits = x @ w.t()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, (x, w)), (logits.argmax(-1) == targets).sum()


@both_ways
# Sizes around the widths of registers (4, 8, 16), a chunk of 256 rows and one of 8,192 columns.
@pytest.mark.parametrize("M,V", [(1, 1), (3, 2), (5, 15), (7, 16), (8, 17), (33, 61), (1030, 8195)])
def test_loss_gradients_and_hits(way, M, V):
    x, w, targets = draw(M, V)
    want, gradients, hits = oracle(x, w, targets)
    loss, likeliest = linear_cross_entropy(x, w, targets)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert int(likeliest) == int(hits)
    for got, expected in zip(torch.autograd.grad(2 * loss, (x, w)), gradients, strict=True):
        scale = float(expected.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(got.double(), 2 * expected, rtol=0, atol=1e-5 * scale)
    with torch.no_grad():
        again, once_more = linear_cross_entropy(x, w, targets)
    torch.testing.assert_close(again, loss.detach(), rtol=1e-6, atol=1e-6)
    assert int(once_more) == int(hits)


@both_ways
def test_only_one_side_needs_a_gradient(way):
    x, w, targets = draw(9, 31)
    _, (want_x, want_w), _ = oracle(x, w, targets)
    loss, _ = linear_cross_entropy(x, w.detach(), targets)
    loss.backward()
    torch.testing.assert_close(x.grad.double(), want_x, rtol=1e-5, atol=1e-5)
    loss, _ = linear_cross_entropy(x.detach(), w, targets)
    loss.backward()
    torch.testing.assert_close(w.grad.double(), want_w, rtol=1e-5, atol=1e-5)


@both_ways
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_products_fp32_softmax(way, autocast):
    """As close to fp64 as PyTorch's own bf16 way, within a few roundings of bf16."""
    x, w, targets = draw(40, 333, dtype=torch.float32 if autocast else torch.bfloat16)
    want, gradients, _ = oracle(x, w, targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = linear_cross_entropy(x, w, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=3e-3, atol=0)
    for got, expected, leaf in zip(
        torch.autograd.grad(loss, (x, w)), gradients, (x, w), strict=True
    ):
        assert got.dtype == leaf.dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 1e-2


@both_ways
@pytest.mark.parametrize("V", [16, 61])
def test_bf16_gradients_are_rounded_to_the_nearest(way, V):
    x, w, targets = draw(50, V, scale=0.3)
    logits = (x @ w.t()).detach().bfloat16()
    want = logits.double().softmax(-1) - F.one_hot(targets, V)
    cross_entropy._loss_and_gradient(logits, targets)
    step = 2.0 ** (want.abs().log2().floor() - 7)  # between neighbours in bf16
    assert ((logits.double() - want).abs() / step).max() < 0.51


@both_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_shows(way, bad):
    x, w, targets = draw(3, 20)
    with torch.no_grad():
        w[7, 0] = bad
    loss, _ = linear_cross_entropy(x, w, targets)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isnan().any()


@both_ways
def test_extreme_logits_stay_finite(way):
    x = torch.eye(D, requires_grad=True)
    w = torch.zeros(20, D)
    w[3], w[4], w[5, 2] = 3e4, -3e4, float("-inf")
    targets = torch.tensor([3, 4] * 6)
    loss, likeliest = linear_cross_entropy(x[:2], w[:, :].nan_to_num(neginf=-3e38), targets[:2])
    assert loss.item() == pytest.approx(6e4)
    assert int(likeliest) == 1
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(gradient).all()


@both_ways
def test_of_equal_logits_the_first_is_likeliest(way):
    x, w = torch.ones(20, 1), torch.zeros(20, 1)
    w[[4, 17]] = 1.0
    _, likeliest = linear_cross_entropy(x, w, torch.arange(20))
    assert int(likeliest) == 1


@both_ways
def test_an_untrained_model_starts_at_ln_v(way):
    x, w = torch.zeros(6, D), torch.randn(151_936, D)
    loss, _ = linear_cross_entropy(x, w, torch.arange(6))
    assert loss.item() / 6 == pytest.approx(11.9312, abs=1e-4)


@both_ways
def test_no_rows_lose_nothing(way):
    x, w, targets = draw(4, 9)
    loss, likeliest = linear_cross_entropy(x[:0], w, targets[:0])
    assert loss.item() == 0 and int(likeliest) == 0
    loss.backward()
    assert not w.grad.any()


def test_both_ways_agree():
    if cross_entropy._compiled() is None:
        pytest.skip("no C compiler")
    x, w, targets = draw(70, 1000)
    logits = (x @ w.t()).detach()
    one, other = logits.clone(), logits.clone()
    in_c = cross_entropy._loss_and_gradient(one, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_compiled", lambda: None)
        in_torch = cross_entropy._loss_and_gradient(other, targets)
    for a, b in zip((*in_c, one), (*in_torch, other)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_as_a_whole():
    """What is kept for the backward pass is as large as the inputs, not M x V."""
    x, w, targets = draw(2000, 3000)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_cross_entropy(x, w, targets)
    assert sorted(kept) == sorted([x.numel(), w.numel()])


@both_ways
def test_targets_must_be_rows_of_the_weight(way):
    x, w, targets = draw(5, 9)
    for odd in (-100, -1, 9):
        bad = targets.clone()
        bad[3] = odd
        with pytest.raises(IndexError, match=f"target {odd} is outside 0 to 8"):
            linear_cross_entropy(x, w, bad)
    for bad in (targets[:4], targets.int(), targets[:, None]):
        with pytest.raises(ValueError, match="targets must be 5 int64 numbers"):
            linear_cross_entropy(x, w, bad)


@both_ways
def test_targets_may_lie_apart(way):
    x, w, targets = draw(6, 9)
    want, _ = linear_cross_entropy(x, w, targets)
    apart = torch.stack((targets, torch.full_like(targets, 7)), dim=1)[:, 0]
    assert not apart.is_contiguous()
    assert torch.equal(linear_cross_entropy(x, w, apart)[0], want)


def test_a_graph_that_is_kept_gives_its_gradient_again():
    """The gradient kept for the backward pass is handed out as it is; never to be changed."""
    x, w, targets = draw(4, 9)
    _, gradients, _ = oracle(x, w, targets)
    loss, _ = linear_cross_entropy(x, w, targets)
    for times in (1, 2, 5):
        (loss * 3 if times == 5 else loss).backward(retain_graph=True)
        for leaf, gradient in zip((x, w), gradients, strict=True):
            torch.testing.assert_close(leaf.grad.double(), times * gradient, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    x, w, targets = draw(4, 9)
    loss, _ = linear_cross_entropy(x, w, targets)
    (gradient,) = torch.autograd.grad(loss * loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocasts_copy_of_the_weight_keeps_its_gradient():
    """The same weight in the head and again in a plain product of the same autocast region."""
    x, w, targets = draw(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, w, targets)
        out = F.linear(x.detach(), w)
    out.float().sum().backward()
    assert w.grad.abs().sum() > 0
