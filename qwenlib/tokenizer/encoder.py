"""Text to ids with gigatoken: the ids of the `tokenizers` library, more than ten times sooner."""

import json
import re
import threading
from typing import Any

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


class Encoder:
    """Ids of normalised text, for a tokenizer.json with Qwen's pre-tokenizer."""

    def __init__(self, tokenizer_json: dict[str, Any]):
        from gigatoken import Tokenizer

        # It has younger tables of normal form C, too: texts come in that form already.
        plain = {**tokenizer_json, "added_tokens": [], "normalizer": None}
        self._core = Tokenizer.from_json(json.dumps(plain))
        self._lock = threading.Lock()  # it has a cache and refuses a second caller

    @staticmethod
    def can_encode(text: str) -> bool:
        """Whether the ids of `text` are those of the `tokenizers` library."""
        return text.isascii() or _YOUNG.search(text) is None

    def encode(self, text: str) -> list[int]:
        """Ids of a text that `can_encode` accepts."""
        with self._lock:
            return self._core.encode(text).tolist()

    def encode_all(self, texts: list[str], parallel: bool) -> list[list[int]]:
        """Ids of several such texts, in this thread or on every core (but in a worker process)."""
        with self._lock:
            return self._core.encode_batch_list(texts, parallel=None if parallel else False)
