"""Checks for the exercises of chapter 01; each says so when nothing has been answered yet."""

from collections.abc import Callable

import torch

from qwenlib.kernels import apply_rope
from qwenlib.model.accounting import kv_bytes_per_token, parameter_count
from qwenlib.model.presets import PRESETS
from qwenlib.model.rope import inverse_frequencies, rope_tables

UNANSWERED = (None, NotImplemented)


def _unsolved(answer: object) -> bool:
    if any(answer is nothing for nothing in UNANSWERED):
        print("not solved yet")
        return True
    return False


def check_exercise_1(conversations: Callable) -> bool:
    """`conversations(config, memory_bytes, context)`: how many full caches fit beside the weights.

    Weights and cache are bf16. Returns True when right, False for the empty stub; raises
    AssertionError with a hint for a wrong answer.
    """
    cases = [("7b", 80e9, 32_768), ("7b", 24e9, 32_768), ("14b", 80e9, 131_072),
             ("32b", 80e9, 32_768), ("72b", 80e9, 1024), ("0.5b", 24e9, 4096)]  # fmt: skip
    for name, memory, context in cases:
        config = PRESETS[name]
        got = conversations(config, memory, context)
        if _unsolved(got):
            return False
        free = memory - 2 * parameter_count(config).total
        want = max(0, int(free // (kv_bytes_per_token(config) * context)))
        if want == 0:
            hint = f"the weights of {name} alone exceed the memory: the answer is 0"
        elif name == "0.5b":
            hint = "a tied head is stored once"
        else:
            hint = "subtract 2 bytes a parameter, then divide by cache bytes a token * context"
        assert got == want, f"{name}, {memory / 1e9:.0f} GB, {context} tokens: got {got}. {hint}"
    print("✓ exercise 1")
    return True


def check_exercise_2(to_half_split: Callable) -> bool:
    """`to_half_split(x)`: reorder the last axis so that pairs (0,1), (2,3) … become (j, j + K/2).

    The original RoPE rotates neighbours, Qwen2.5 rotates halves. With the reordering both give the
    same attention scores. Returns and raises as `check_exercise_1`.
    """
    generator = torch.Generator().manual_seed(0)
    B, T, H, K = 2, 9, 3, 8
    q, k = torch.randn(2, B, T, H, K, generator=generator)
    got = to_half_split(q)
    if _unsolved(got):
        return False
    assert isinstance(got, torch.Tensor) and got.shape == q.shape, "keep the shape (B, T, H, K)"
    positions = torch.arange(T).expand(B, T)
    frequencies = inverse_frequencies(K, 10_000.0)
    angle = positions[..., None, None] * frequencies

    def neighbours(x):
        turned = torch.view_as_complex(x.unflatten(-1, (K // 2, 2))) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(-2)

    tables = rope_tables(positions, frequencies, 1.0, torch.float32)
    want = torch.einsum("bthk,bshk->bhts", neighbours(q), neighbours(k))
    ours = torch.einsum(
        "bthk,bshk->bhts",
        apply_rope(to_half_split(q), *tables),
        apply_rope(to_half_split(k), *tables),
    )
    assert torch.allclose(want, ours, atol=1e-4), (
        "the scores differ: entry 2j of each head goes to place j, entry 2j+1 to place j + K/2"
    )
    print("✓ exercise 2")
    return True
