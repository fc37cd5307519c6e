"""Decoding while ids arrive: whole characters only."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlib.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Text of ids as they come; made by `Tokenizer.stream`.

    A character of several tokens waits until it is whole. All that `push` and `finish` return,
    joined, is `Tokenizer.decode` of all ids, invalid bytes as U+FFFD included.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._left_out = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """The characters that these ids complete, perhaps none. ValueError for a negative id."""
        try:
            ids = [operator.index(ids)]
        except TypeError:  # several
            ids = map(operator.index, ids)
        kept = (i for i in ids if i not in self._left_out)
        return self._bytes.decode(self._tokenizer.decode_bytes(kept))

    def finish(self) -> str:
        """U+FFFD for a character that the last ids left incomplete, else nothing; starts anew."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest
