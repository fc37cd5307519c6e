"""Report §2: the dense transformer, its rotary positions, its cache and its checkpoints."""

from qwenlib.model.checkpoint import load_pretrained, save_pretrained
from qwenlib.model.config import QwenConfig
from qwenlib.model.transformer import KVCache, Qwen

__all__ = ["KVCache", "Qwen", "QwenConfig", "load_pretrained", "save_pretrained"]
