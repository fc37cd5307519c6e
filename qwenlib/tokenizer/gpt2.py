"""GPT-2's byte-level BPE, to compare with: its own pattern, 50,257 tokens, no normal form.

Source: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.2,
and the files released with it. Algorithm and byte order are those of `bpe`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qwenlib.tokenizer.bpe import Merge, as_bytes, as_text, vocabulary
from qwenlib.tokenizer.control import END_OF_TEXT
from qwenlib.tokenizer.normal_form import check_text

# Digits stay together, only a space may open a word, and a line end is white space like any other.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PRETOKEN = regex.compile(GPT2_PATTERN)


def gpt2_pretokenize(text: str) -> list[str]:
    """Split `text` as GPT-2 does; joined again the pieces are `text`."""
    return _PRETOKEN.findall(text)


class GPT2Tokenizer:
    """Byte-level BPE behind a pattern of choice, with the reading methods of `Tokenizer`.

    Regular ids are the 256 bytes and the merges in order; `<|endoftext|>`, GPT-2's one control
    token, follows them and is never spelled by a text.
    """

    def __init__(self, merges: Sequence[Merge], pattern: str = GPT2_PATTERN) -> None:
        self._tokens = vocabulary(merges)
        vocab = {as_text(token): i for i, token in enumerate(self._tokens)}
        pairs = [(as_text(left), as_text(right)) for left, right in merges]
        self._backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
        self._backend.decoder = decoders.ByteLevel()
        self.control: dict[str, int] = {END_OF_TEXT: len(self._tokens)}
        self._tokens.append(END_OF_TEXT.encode())

    @classmethod
    def from_asset(cls) -> "GPT2Tokenizer":
        """The real GPT-2 vocabulary, fetched once; assets.AssetError says why it cannot be had."""
        from qwenlib import assets

        return cls(read_merges(assets.fetch("gpt2-vocabulary")))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. TypeError for anything but a str, ValueError for a lone surrogate."""
        check_text(text)
        return self._backend.encode(text).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel threads."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and where each token stands in `text`: (start, end) in characters."""
        check_text(text)
        encoding = self._backend.encode(text)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; raises ValueError outside the vocabulary."""
        if not 0 <= token_id < len(self._tokens):
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[token_id]

    @property
    def vocab_size(self) -> int:
        """Rows: regular tokens and `<|endoftext|>`."""
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"GPT2Tokenizer({self.vocab_size - 1:,} regular + 1 control token)"


def read_merges(path: str | Path) -> list[Merge]:
    """Merges of a `vocab.bpe` or `merges.txt` file: a version line, then two tokens a line.

    Raises ValueError with the line that holds no merge.
    """
    merges: list[Merge] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if number == 1 and line.startswith("#version"):
            continue
        try:
            left, right = line.split(" ")
            merges.append((as_bytes(left), as_bytes(right)))
        except (ValueError, KeyError):
            raise ValueError(f"{path}, line {number}: not two tokens: {line[:40]!r}") from None
    return merges
