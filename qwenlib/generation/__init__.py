"""Sampling with a KV cache."""

from qwenlib.generation.sampler import Generation, generate

__all__ = ["Generation", "generate"]
