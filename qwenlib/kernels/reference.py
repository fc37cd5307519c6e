"""PyTorch definitions of the fused operations: the truth every faster kernel is tested against.

Shapes: B batch, T query time, S key time, H query heads, G key/value heads, K head dim, D hidden,
F ffn.
"""

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

    cos and sin come from `model.rope.rope_tables` and may carry YaRN's attention factor.
    """
    first, second = x_BTHK.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_BTHK * cos_BTK.unsqueeze(2) + rotated * sin_BTK.unsqueeze(2)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """SwiGLU's product: silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate_BTF) * up_BTF


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor | None = None
) -> Tensor:
    """Grouped-query attention; query head h reads key/value head h // (H // G).

    mask_B1TS is True where a query may look; None means plain causal with T == S. A query that may
    look nowhere (a padding row) gets zeros, never NaN. Returns (B, T, H, K).
    """
    if q_BTHK.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # bf16 attention on a CPU has a backward pass four times slower than the fp32 one.
        with torch.autocast("cpu", enabled=False):
            return attention(q_BTHK.float(), k_BSGK.float(), v_BSGK.float(), mask_B1TS)
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    if q_BTHK.shape[1] == 1 and groups > 1 and mask_B1TS is not None:
        # One query a row: the heads of a group stand in as its queries, and no key is copied.
        grouped = q_BTHK.unflatten(2, (-1, groups))[:, 0].transpose(1, 2)
        return attention(grouped, k_BSGK, v_BSGK, mask_B1TS).transpose(1, 2).flatten(1, 2)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if mask_B1TS is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    else:
        blind_B1T1 = ~mask_B1TS.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS | blind_B1T1)
        out = out.masked_fill(blind_B1T1, 0.0)
    return out.transpose(1, 2)
