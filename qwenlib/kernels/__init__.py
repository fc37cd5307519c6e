"""The one switch for fused operations: library code calls these names and never picks a backend.

Every operation has a reference in PyTorch (`reference.py`) that defines it and runs on any device.
"""

from qwenlib.kernels.cpu import linear
from qwenlib.kernels.cross_entropy import linear_cross_entropy
from qwenlib.kernels.grouped import expert_ffn
from qwenlib.kernels.logprobs import linear_logprobs
from qwenlib.kernels.reference import apply_rope, attention, decode_attention, rms_norm, swiglu

__all__ = [
    "apply_rope",
    "attention",
    "decode_attention",
    "expert_ffn",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "rms_norm",
    "swiglu",
]
