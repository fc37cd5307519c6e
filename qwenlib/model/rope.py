"""Rotary positions: frequencies, base change (ABF), and YaRN as pure functions.

Shapes: B batch, T time, K head dim.
"""

import math

import torch
from torch import Tensor

from qwenlib.model.config import QwenConfig, YarnConfig


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """θ^(-2j/K) for j in 0 … K/2-1, fp32 (arXiv 2104.09864).

    Written as 1 / θ^(2j/K), as in the released code: another rounding shows at far positions.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def yarn_ramp(head_dim: int, theta: float, yarn: YarnConfig) -> tuple[int, int, Tensor]:
    """First and last dimension of YaRN's ramp, and the interpolated share of each frequency.

    Dimension d(β) turns β times over the trained length: K ln(L/(2πβ)) / (2 ln θ). Below
    d(beta_fast) frequencies stay; above d(beta_slow) they are divided by the factor.
    """

    def dimension(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), head_dim - 1)
    width = max(high - low, 0.001)  # a ramp of no width would divide by zero
    share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return low, high, share


def rope_frequencies(config: QwenConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (K/2,) in fp32 and the factor on cos and sin (1 without YaRN)."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    if config.yarn is None:
        return frequencies, 1.0
    _, _, share = yarn_ramp(config.head_dim, config.rope_theta, config.yarn)
    mixed = frequencies / config.yarn.factor * share + frequencies * (1 - share)
    return mixed, config.yarn.resolved_attention_factor


def rope_tables(
    position_ids_BT: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, K) as `kernels.apply_rope` takes them: sin with a minus in its first half.

    Angles are fp32: bf16 positions are already wrong above 256.
    """
    angles_BTK = position_ids_BT.float().unsqueeze(-1) * frequencies.to(position_ids_BT.device)
    cos, sin = angles_BTK.cos() * factor, angles_BTK.sin() * factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
