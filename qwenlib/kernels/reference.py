"""PyTorch definitions of the fused operations: the truth every faster kernel is tested against.

Shapes: B batch, T query time, S key time, H query heads, G key/value heads, K head dim, D hidden,
F ffn, N tokens, E experts, C chosen experts of a token.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_BTD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root-mean-square in fp32, then multiply by the gain.

    The normalised vector returns to the input dtype *before* the gain, as the released
    implementation does; in bf16 the other order gives other bits.
    """
    if x_BTD.dtype == torch.float32:
        return F.rms_norm(x_BTD, gain_D.shape, gain_D, eps)
    return gain_D * F.rms_norm(x_BTD.float(), gain_D.shape, None, eps).to(x_BTD.dtype)


def apply_rope(x_BTHK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j+K/2}) by its position's angle ("half-split" layout).

    cos and sin come from `model.rope.rope_tables`: sin is negative in its first half, so that the
    exchanged halves need no sign, and both may carry YaRN's attention factor.
    """
    exchanged = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    # Two roundings, like the released code; addcmul would make it one, and other bits.
    return x_BTHK * cos_BTK.unsqueeze(2) + exchanged * sin_BTK.unsqueeze(2)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """SwiGLU's product: silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate_BTF) * up_BTF


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor | None = None
) -> Tensor:
    """Grouped-query attention; query head h reads key/value head h // (H // G).

    mask_B1TS is True where a query may look; None means plain causal with T == S, or everything for
    a single query. A query that may look nowhere (a padding row) gets zeros, never NaN. Returns
    (B, T, H, K).
    """
    if q_BTHK.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # bf16 attention on a CPU has a backward pass four times slower than the fp32 one.
        with torch.autocast("cpu", enabled=False):
            return attention(q_BTHK.float(), k_BSGK.float(), v_BSGK.float(), mask_B1TS)
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    copied = groups > 1 and q.device.type != "cpu"  # a GPU's kernel with a mask knows no groups
    if copied:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    attend = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=not copied)
    if mask_B1TS is None:
        out = attend(is_causal=q.shape[2] > 1)
    else:
        blind_B1T1 = ~mask_B1TS.any(-1, keepdim=True)
        out = attend(attn_mask=mask_B1TS | blind_B1T1).masked_fill(blind_B1T1, 0.0)
    return out.transpose(1, 2)


def decode_attention(
    q_NHK: Tensor, k_NGSK: Tensor, v_NGSK: Tensor, bias_N1S: Tensor | None = None
) -> Tensor:
    """`attention` for one query a row over a cache; bias is 0 where it may look, else -inf.

    The heads of a group stand in as queries of their key/value head, so no key is copied. Returns
    (N, H, K).
    """
    N, G, _, K = k_NGSK.shape
    q = q_NHK.reshape(N * G, -1, K) * K**-0.5
    scores = torch.bmm(q, k_NGSK.flatten(0, 1).transpose(1, 2))
    if bias_N1S is not None:
        scores = (scores.unflatten(0, (N, G)) + bias_N1S[:, None]).flatten(0, 1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights, v_NGSK.flatten(0, 1)).view(N, -1, K)


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b for the few rows of a decoding step; no gradients."""
    return F.linear(x_ND, weight_FD, bias_F)


def expert_ffn(
    x_ND: Tensor, gate_up_EXD: Tensor, down_EDF: Tensor, experts_NC: Tensor, gates_NC: Tensor
) -> Tensor:
    """Each token's gated sum over its chosen SwiGLU experts; gate and up are stacked, X = 2F.

    y_n = sum over c of gates[n, c] * FFN_experts[n, c](x_n). Returns (N, D).
    """
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EXD.shape[0]):
        rows, places = torch.where(experts_NC == expert)
        gate, up = F.linear(x_ND[rows], gate_up_EXD[expert]).chunk(2, dim=-1)
        y = F.linear(swiglu(gate, up), down_EDF[expert])
        out_ND = out_ND.index_add(0, rows, y * gates_NC[rows, places, None])
    return out_ND
