"""Checks for the exercises of chapter 03; each says so when nothing has been answered yet."""

from collections.abc import Callable

import torch

from qwenlib.model.accounting import parameter_count
from qwenlib.model.config import MoEConfig, QwenConfig
from qwenlib.model.moe import load_balancing_loss
from qwenlib.model.transformer import MoE

UNANSWERED = (None, NotImplemented)


def _unsolved(answer: object) -> bool:
    if any(answer is nothing for nothing in UNANSWERED):
        print("not solved yet")
        return True
    return False


def _config(hidden: int, moe: MoEConfig) -> QwenConfig:
    return QwenConfig(
        vocab_size=1, hidden_size=hidden, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1, head_dim=2,
        moe=moe,
    )  # fmt: skip


def check_exercise_1(layer_parameters: Callable) -> bool:
    """`layer_parameters(hidden, experts, chosen, width, shared_width)` -> (total, activated).

    Weights of one mixture layer, both gates included. Returns True when right, False for the empty
    stub; raises AssertionError with a hint for a wrong answer.
    """
    cases = ((2048, 60, 4, 1408, 5632), (3584, 64, 8, 2560, 20_480), (7, 3, 3, 5, 2))
    for hidden, experts, chosen, width, shared_width in cases:
        got = layer_parameters(hidden, experts, chosen, width, shared_width)
        if _unsolved(got):
            return False
        count = parameter_count(_config(hidden, MoEConfig(experts, chosen, width, shared_width)))
        total = count.ffn + count.router
        want = (total, total - count.idle)
        if total - got[0] in (experts * hidden, hidden, (experts + 1) * hidden):
            hint = "the router has experts x hidden weights, the shared expert's gate hidden more"
        else:
            hint = "a SwiGLU has three matrices; a token leaves experts - chosen of them idle"
        assert tuple(got) == want, f"{experts} experts of {width}: got {got}, want {want}. {hint}"
    print("✓ exercise 1")
    return True


def check_exercise_2(route: Callable) -> bool:
    """`route(router_logits_NE, top_k)` -> gates and experts (N, C), as the network routes.

    Returns and raises as `check_exercise_1`.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        layer = MoE(_config(8, MoEConfig(12, 4, 8, 8)))
    for dtype in (torch.float32, torch.bfloat16):
        logits_NE = (2 * torch.randn(40, 12, generator=generator)).to(dtype)
        got = route(logits_NE, 4)
        if _unsolved(got):
            return False
        gates_NC, experts_NC = got
        want_gates, want_experts = layer.route(logits_NE)
        assert gates_NC.shape == experts_NC.shape == (40, 4), "both are (N, C)"
        sums_N = gates_NC.float().sum(1)
        assert not torch.allclose(sums_N, torch.ones(40), atol=1e-2), (
            "the gates sum to one: take the softmax over all experts and do not renormalise"
        )
        assert gates_NC.dtype == torch.float32, "route in fp32, whatever the logits come in"
        assert torch.allclose(gates_NC.sort(1).values, want_gates.sort(1).values, atol=1e-6), (
            "the gates are other numbers: softmax over all experts, in fp32, then the largest"
        )
        assert torch.allclose(gates_NC, want_gates, atol=1e-6), "the largest gate comes first"
        picked_NC = logits_NE.float().softmax(1).gather(1, experts_NC)
        assert torch.allclose(picked_NC, want_gates, atol=1e-6), "gates and experts do not match"
        distinct = all(len(set(row)) == 4 for row in experts_NC.tolist())
        assert distinct and experts_NC.dtype == want_experts.dtype, "four different int64 numbers"
    print("✓ exercise 2")
    return True


def check_exercise_3(balance_loss: Callable) -> bool:
    """`balance_loss(router_logits_NE, top_k, mask_N)`: one layer's E sum f P, as a scalar tensor.

    Returns and raises as `check_exercise_1`.
    """
    generator = torch.Generator().manual_seed(0)
    mine_NE = torch.randn(30, 6, generator=generator).requires_grad_()
    yours_NE = mine_NE.detach().clone().requires_grad_()
    mask_N = (torch.rand(30, generator=generator) < 0.7).long()
    got = balance_loss(yours_NE, 2, mask_N)
    if _unsolved(got):
        return False
    want = load_balancing_loss([mine_NE], 2, mask_N)
    unmasked = load_balancing_loss([mine_NE], 2)
    assert not torch.allclose(got, unmasked, atol=1e-5), "tokens whose mask is 0 still count"
    assert not torch.allclose(2 * got, want, atol=1e-5), (
        "f counts visits a token: over all experts it sums to top_k, not to 1"
    )
    assert torch.allclose(got, want, atol=1e-5), f"got {got.item():.4f}, want {want.item():.4f}"
    assert got.requires_grad, "no gradient reaches the router: P must stay attached to its logits"
    (got_NE,), (want_NE,) = (
        torch.autograd.grad(loss, logits) for loss, logits in ((got, yours_NE), (want, mine_NE))
    )
    assert torch.allclose(got_NE, want_NE, atol=1e-6), "the gradient is another one"
    even = balance_loss(torch.eye(6).repeat(5, 1), 1, torch.ones(30))
    assert abs(even.item() - 1) < 1e-5, "with even use and one visit a token the loss is 1"
    print("✓ exercise 3")
    return True
