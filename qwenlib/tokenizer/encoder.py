"""Text to ids with gigatoken: the ids of the `tokenizers` library, more than ten times sooner."""

import json
import re
import threading
from typing import Any

import numpy as np

from qwenlib.tokenizer.bpe import CHAR_TO_BYTE

# Letters and digits of Unicode 17. gigatoken knows them, the `tokenizers` library does not yet, so
# the two would cut texts with them at different places.
_YOUNG = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7"
    "\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3"
    "\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2"
    "\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5\U0001e6e7-\U0001e6ed"
    "\U0001e6f0-\U0001e6f4\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)


# gigatoken remembers every pre-token it has met, some 135 bytes for each that is new, and never
# forgets. After so many characters the encoder begins anew; random text fills some GB by then.
_RENEW = 200_000_000


class Encoder:
    """Ids of normalised text, for a tokenizer.json with Qwen's pre-tokenizer."""

    def __init__(self, tokenizer_json: dict[str, Any]):
        # It has younger tables of normal form C, too: texts come in that form already.
        self._source = json.dumps({**tokenizer_json, "added_tokens": [], "normalizer": None})
        self._lock = threading.Lock()  # its cache lets in one caller at a time
        self._begin()

    def _begin(self) -> None:
        from gigatoken import Tokenizer

        self._core, self._seen = Tokenizer.from_json(self._source), 0

    def _count(self, characters: int) -> None:
        self._seen += characters
        if self._seen > _RENEW:
            self._begin()

    @staticmethod
    def can_build(tokenizer_json: dict[str, Any]) -> bool:
        """Whether the model is BPE over all 256 bytes and nothing else."""
        model = tokenizer_json["model"]
        more = (
            "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
            "byte_fallback", "ignore_merges",
        )  # fmt: skip
        return not any(map(model.get, more)) and all(c in model["vocab"] for c in CHAR_TO_BYTE)

    @staticmethod
    def can_encode(text: str) -> bool:
        """Whether the ids of `text` are those of the `tokenizers` library."""
        return text.isascii() or _YOUNG.search(text) is None

    def encode(self, text: str) -> list[int]:
        """Ids of a text that `can_encode` accepts."""
        with self._lock:
            self._count(len(text))
            return self._core.encode(text).tolist()

    def encode_all(self, texts: list[str], parallel: bool) -> list[list[int]]:
        """Ids of several such texts, in this thread or on every core (but in a worker process)."""
        with self._lock:
            self._count(sum(map(len, texts)))
            return self._core.encode_batch_list(texts, parallel=None if parallel else False)

    def encode_arrays(self, texts: list[str], parallel: bool) -> list[np.ndarray]:
        """`encode_all` as arrays: four times as fast, as no id becomes a Python number."""
        with self._lock:
            self._count(sum(map(len, texts)))
            layout = self._core.encode_batch(texts, parallel=None if parallel else False).layout
        return np.split(np.asarray(layout.content.data), np.asarray(layout.offsets.data)[1:-1])
