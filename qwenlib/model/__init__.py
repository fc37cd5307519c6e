"""Report §2: the transformer, dense and mixture of experts, its positions, cache, checkpoints."""

from qwenlib.model.checkpoint import load_pretrained, save_pretrained
from qwenlib.model.config import MoEConfig, QwenConfig
from qwenlib.model.transformer import KVCache, Qwen

__all__ = ["KVCache", "MoEConfig", "Qwen", "QwenConfig", "load_pretrained", "save_pretrained"]
