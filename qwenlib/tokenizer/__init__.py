"""Byte-level BPE, the 22 control tokens and ChatML (report section 2)."""

from qwenlib.tokenizer.bpe import Merge, train_bpe
from qwenlib.tokenizer.chat import encode_chat, render
from qwenlib.tokenizer.control import CONTROL_TOKENS, ControlToken
from qwenlib.tokenizer.tokenizer import Tokenizer

__all__ = [
    "CONTROL_TOKENS",
    "ControlToken",
    "Merge",
    "Tokenizer",
    "encode_chat",
    "render",
    "train_bpe",
]
