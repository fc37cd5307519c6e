"""Byte-level BPE, the 22 control tokens and ChatML (report section 2)."""

from qwenlib.tokenizer.bpe import Merge
from qwenlib.tokenizer.chat import encode_chat, render
from qwenlib.tokenizer.control import CONTROL_TOKENS, ControlToken
from qwenlib.tokenizer.tokenizer import Tokenizer
from qwenlib.tokenizer.trainer import train_bpe

__all__ = [
    "CONTROL_TOKENS",
    "ControlToken",
    "Merge",
    "Tokenizer",
    "encode_chat",
    "render",
    "train_bpe",
]
