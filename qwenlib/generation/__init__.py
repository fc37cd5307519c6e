"""Sampling with a KV cache."""

from qwenlib.generation.sampler import Generation, generate, stream, stream_text
from qwenlib.generation.sampling import Sampling

__all__ = ["Generation", "Sampling", "generate", "stream", "stream_text"]
