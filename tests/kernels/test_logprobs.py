"""Log-probabilities and entropies from the head: against whole logits and autograd in fp64."""

import pytest
import torch
import torch.nn.functional as F

from qwenlib.kernels import linear_cross_entropy, linear_logprobs, logprobs

D = 12


def draw(M, V, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, D, generator=generator, dtype=torch.float64)
    w = scale * D**-0.5 * torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (M,), generator=generator)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


def whole(x, w, targets, temperature=1.0):
    """The definition, with the logits as one matrix, in fp64 from the same numbers."""
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    log_p = (x @ w.t() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
    return x, w, log_p.gather(1, targets[:, None])[:, 0], entropy


def weigh(logp, entropy, which):
    """A different weight for each row, of either sign; some rows count nothing."""
    weights = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    weights = torch.where(torch.arange(len(logp)) % 5 == 3, 0.0, weights)
    parts = {"log-probability": logp @ weights}
    if entropy is not None:
        parts["entropy"] = entropy @ weights.flip(0)
        parts["both"] = parts["log-probability"] + parts["entropy"]
    return parts[which]


def close(got, want, limit=1e-5):
    scale = float(want.abs().max().clamp(min=1e-3)) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=limit * scale)


SHAPES = [(0, 9), (1, 1), (1, 7), (3, 2), (199, 61), (33, 1000), (270, 8200)]


# (270, 8200): two chunks of rows, and two of the vocabulary in the weight's gradient.
@pytest.mark.parametrize("M,V", SHAPES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 50.0])
def test_values_and_gradients(M, V, temperature):
    x, w, targets = draw(M, V)
    logp, none = linear_logprobs(x, w, targets, temperature)
    assert none is None
    again, entropy = linear_logprobs(x, w, targets, temperature, with_entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(again, logp, rtol=1e-6, atol=1e-6)
    x_64, w_64, want_logp, want_entropy = whole(x, w, targets, temperature)
    close(again, want_logp.detach())
    close(entropy, want_entropy.detach())
    for which in ("log-probability", "entropy", "both"):
        want = torch.autograd.grad(
            weigh(want_logp, want_entropy, which), (x_64, w_64), retain_graph=True
        )
        runs = [(again, entropy)] + [(logp, None)] * (which == "log-probability")
        for outputs in runs:
            got = torch.autograd.grad(weigh(*outputs, which), (x, w), retain_graph=True)
            for ours, theirs in zip(got, want, strict=True):
                close(ours, theirs)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradcheck(with_entropy):
    """In fp64, over several chunks, with a temperature."""
    x, w, targets = draw(7, 11, scale=1.0, dtype=torch.float64)

    def outputs(x, w):
        pair = linear_logprobs(x, w, targets, 0.6, with_entropy)
        assert pair[0].dtype == torch.float64
        return pair if with_entropy else pair[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "chunk_rows", lambda weight: 3)
        torch.autograd.gradcheck(outputs, (x, w))


def test_minus_the_sum_is_the_cross_entropy():
    x, w, targets = draw(20, 33)
    loss, _ = linear_cross_entropy(x, w, targets)
    torch.testing.assert_close(-linear_logprobs(x, w, targets)[0].sum(), loss)


def test_only_one_side_needs_a_gradient_and_none_without_grad():
    x, w, targets = draw(9, 31)
    x_64, w_64, logp, _ = whole(x, w, targets)
    want_x, want_w = torch.autograd.grad(logp.sum(), (x_64, w_64))
    (got,) = torch.autograd.grad(linear_logprobs(x, w.detach(), targets)[0].sum(), x)
    close(got, want_x)
    (got,) = torch.autograd.grad(linear_logprobs(x.detach(), w, targets)[0].sum(), w)
    close(got, want_w)
    with torch.no_grad():
        quiet, entropy = linear_logprobs(x, w, targets, with_entropy=True)
    assert not quiet.requires_grad and not entropy.requires_grad
    close(quiet, logp.detach())


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_products_fp32_softmax(autocast):
    """The logits are those of a bf16 product; what follows is fp32."""
    x, w, targets = draw(40, 333, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp, entropy = linear_logprobs(x, w, targets, 0.9, with_entropy=True)
        logits = F.linear(x, w)
    assert logits.dtype == torch.bfloat16 and logp.dtype == entropy.dtype == torch.float32
    log_p = (logits.detach().double() / 0.9).log_softmax(-1)
    close(logp, log_p.gather(1, targets[:, None])[:, 0], 1e-6)
    close(entropy, -(log_p.exp() * log_p).sum(-1), 1e-6)
    x_64, w_64, want_logp, want_entropy = whole(x, w, targets, 0.9)
    want = torch.autograd.grad(weigh(want_logp, want_entropy, "both"), (x_64, w_64))
    got = torch.autograd.grad(weigh(logp, entropy, "both"), (x, w))
    for ours, theirs, leaf in zip(got, want, (x, w), strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2


def test_autocast_in_the_backward_pass_changes_nothing():
    """A loss may be differentiated inside the region that made it, or outside."""
    results = []
    for inside in (False, True):
        x, w, targets = draw(8, 20)
        loss = linear_logprobs(x, w, targets)[0].sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(loss, (x, w)))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_large_logits_keep_their_digits():
    """Scores of ten thousand, apart by little; one far below, whose probability is 0."""
    x = torch.eye(3, requires_grad=True)
    scores = torch.tensor([[1e4, 1e4 - 1, 1e4 - 2, -1e4], [-3e4] * 4, [3e38, -3e38, 0, 1]])
    w = scores.t().clone().requires_grad_()
    targets = torch.tensor([1, 2, 1])
    logp, entropy = linear_logprobs(x, w, targets, with_entropy=True)
    want = torch.log_softmax(torch.tensor([0.0, -1.0, -2.0]), 0)
    assert logp[0].item() == pytest.approx(want[1].item(), abs=1e-6)
    assert logp[1].item() == pytest.approx(torch.tensor(0.25).log().item(), abs=1e-6)
    assert entropy.tolist() == pytest.approx([-(want.exp() @ want).item(), 1.386294, 0], abs=1e-6)
    (gradient,) = torch.autograd.grad((logp + 2 * entropy).sum(), w)
    p = want.exp()
    expected = F.one_hot(targets[0], 3) - p - 2 * p * (want + entropy[0].detach())
    torch.testing.assert_close(gradient[:3, 0], expected, rtol=0, atol=1e-5)
    assert gradient[3, 0] == 0 and torch.isfinite(gradient).all()


def test_a_token_that_cannot_come_counts_nothing():
    """Logits of -inf, as a mask over the vocabulary gives them, in value and in gradient."""
    x, w, targets = draw(5, 12)
    x, w = x.detach().abs().requires_grad_(), w.detach()
    w[7:] = float("-inf")
    targets %= 7
    logp, entropy = linear_logprobs(x, w, targets, with_entropy=True)
    _, _, want_logp, want_entropy = whole(x, w[:7], targets)
    close(logp, want_logp.detach())
    close(entropy, want_entropy.detach())
    w.requires_grad_()
    outputs = linear_logprobs(x.detach(), w, targets, with_entropy=True)
    (gradient,) = torch.autograd.grad(weigh(*outputs, "both"), w)
    assert torch.isfinite(gradient).all() and not gradient[7:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_shows(bad):
    x, w, targets = draw(3, 20)
    with torch.no_grad():
        w[7, 0] = bad
    logp, entropy = linear_logprobs(x, w, targets, with_entropy=True)
    assert logp.isnan().any() and entropy.isnan().any()
    (gradient,) = torch.autograd.grad(logp.sum(), x)
    assert gradient.isnan().any()


def test_operands_may_lie_apart():
    x, w, targets = draw(6, 9)
    want = linear_logprobs(x, w, targets)[0]
    grad = torch.autograd.grad(want.sum(), (x, w))
    strewn = [torch.stack((t.detach(), t.detach()), -1)[..., 0] for t in (x, w, targets)]
    assert not any(t.is_contiguous() for t in strewn)
    x, w, targets = strewn
    x, w = x.requires_grad_(), w.requires_grad_()
    got = linear_logprobs(x, w, targets)[0]
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), (x, w)), grad, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_untrained_model_is_as_unsure_as_can_be():
    x, w = torch.zeros(6, D), torch.randn(151_936, D)
    logp, entropy = linear_logprobs(x, w, torch.arange(6), with_entropy=True)
    torch.testing.assert_close(logp, torch.full((6,), -11.9312), rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy, torch.full((6,), 11.9312), rtol=0, atol=1e-4)


def test_two_numbers_a_row_are_kept():
    x, w, targets = draw(2000, 3000)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_logprobs(x, w, targets)
    assert sorted(kept) == sorted([x.numel(), w.numel(), 2000, 2000, 2000])


def test_bad_input_is_named():
    x, w, targets = draw(5, 9)
    for odd in (-100, -1, 9):
        bad = targets.clone()
        bad[3] = odd
        with pytest.raises(IndexError, match=f"target {odd} is outside 0 to 8"):
            linear_logprobs(x, w, bad)
    for bad in (targets[:4], targets.int(), targets[:, None]):
        with pytest.raises(ValueError, match="targets must be 5 int64 numbers"):
            linear_logprobs(x, w, bad)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            linear_logprobs(x, w, targets, temperature)


def test_a_second_derivative_is_refused():
    x, w, targets = draw(4, 9)
    logp, _ = linear_logprobs(x, w, targets)
    (gradient,) = torch.autograd.grad(logp.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocasts_copy_of_the_weight_keeps_its_gradient():
    """The same weight in the head and again in a plain product of the same autocast region."""
    x, w, targets = draw(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        linear_logprobs(x, w, targets)
        out = F.linear(x.detach(), w)
    out.float().sum().backward()
    assert w.grad.abs().sum() > 0
