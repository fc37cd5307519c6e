"""The tokenizer: byte-level BPE plus 22 control tokens, stored as a Hugging Face folder.

Encoding runs in the Rust `tokenizers` library; training, vocabulary and template are ours.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from qwenlib.tokenizer.bpe import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    PRETOKEN_PATTERN,
    Merge,
    merges_from_ranks,
    vocabulary,
)
from qwenlib.tokenizer.chat import CHAT_TEMPLATE
from qwenlib.tokenizer.control import CONTROL_TOKENS, END_OF_TEXT, IM_END, IM_START


class Tokenizer:
    """Text to ids and back. Control-token strings in text are text unless `allow_control` is set.

    Build one with `from_merges`, `from_pretrained`, `from_tiktoken` or `from_asset`.
    """

    def __init__(self, tokenizer_json: dict, chat_template: str = CHAT_TEMPLATE) -> None:
        self._full = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json))
        # The same model without added tokens cannot produce a control id, whatever the text says.
        plain = {**tokenizer_json, "added_tokens": []}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.chat_template = chat_template
        self.control: dict[str, int] = {
            token["content"]: token["id"] for token in tokenizer_json["added_tokens"]
        }
        for name in (END_OF_TEXT, IM_START, IM_END):
            if name not in self.control:
                raise ValueError(f"tokenizer.json has no {name}: not a Qwen2.5 layout")
        self.end_of_text_id: int = self.control[END_OF_TEXT]
        self.pad_token_id: int = self.end_of_text_id
        self.im_start_id: int = self.control[IM_START]
        self.eos_token_id: int = self.control[IM_END]

    @classmethod
    def from_merges(cls, merges: Sequence[Merge]) -> "Tokenizer":
        """Tokenizer from trained merges; the control tokens take the ids after the regular ones."""
        tokens = vocabulary(merges)
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={_as_text(token): i for i, token in enumerate(tokens)},
                merges=[(_as_text(left), _as_text(right)) for left, right in merges],
                fuse_unk=False,
                byte_fallback=False,
            )
        )
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PRETOKEN_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.add_tokens(
            [
                AddedToken(token.text, special=token.special, normalized=False)
                for token in CONTROL_TOKENS
            ]
        )
        return cls(json.loads(backend.to_str()))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Tokenizer from a Hugging Face folder; raises FileNotFoundError without tokenizer.json."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give a folder written by Tokenizer.save_pretrained or a "
                "Qwen2.5 model folder"
            )
        template = CHAT_TEMPLATE
        config, jinja = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        if jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
        elif config.is_file():
            template = json.loads(config.read_text(encoding="utf-8")).get("chat_template", template)
        return cls(json.loads(path.read_text(encoding="utf-8")), template)

    @classmethod
    def from_tiktoken(cls, path: str | Path) -> "Tokenizer":
        """Tokenizer from a tiktoken rank file: a line is base64(token), space, rank."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: not 'base64 rank': {line[:40]!r}"
                ) from error
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{path}: ranks are not 0 to {len(ranks) - 1}, the file is damaged")
        merges = merges_from_ranks(ranks)
        if vocabulary(merges) != sorted(ranks, key=ranks.__getitem__):
            raise ValueError(f"{path}: the first 256 ranks are not the bytes in GPT-2's order")
        return cls.from_merges(merges)

    @classmethod
    def from_asset(cls) -> "Tokenizer":
        """The real Qwen2.5 vocabulary (151,643 + 22 tokens); the converted folder is cached."""
        from qwenlib import assets

        ranks_file = assets.fetch("qwen-vocabulary")
        # What shapes the folder is in its name, so that a change here cannot meet an old copy.
        layout = repr((CONTROL_TOKENS, PRETOKEN_PATTERN, CHAT_TEMPLATE)).encode()
        folder = ranks_file.parent / f"hf-{hashlib.sha256(layout).hexdigest()[:12]}"
        if not (folder / "tokenizer.json").is_file():
            cls.from_tiktoken(ranks_file).save_pretrained(folder)
        return cls.from_pretrained(folder)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, vocab.json, merges.txt and the token map."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer_json = json.loads(self._full.to_str())
        model, added = tokenizer_json["model"], tokenizer_json["added_tokens"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        names = {
            "additional_special_tokens": [
                t["content"] for t in added if t["special"] and t["id"] != self.end_of_text_id
            ],
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
        }
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in flags} for t in added},
            **names,
            "bos_token": None,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 131072,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        files = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{m}\n" for m in merges),
            "special_tokens_map.json": json.dumps(names, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            # Last: its presence says that the folder is complete.
            "tokenizer.json": json.dumps(tokenizer_json, indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in files.items():
            partial = directory / f".{name}.{os.getpid()}"
            partial.write_text(content, encoding="utf-8")
            partial.replace(directory / name)

    def encode(self, text: str, allow_control: bool = False) -> list[int]:
        """Ids of `text`; with `allow_control` the 22 control strings become their single ids."""
        return (self._full if allow_control else self._plain).encode(text).ids

    def encode_batch(self, texts: Iterable[str], allow_control: bool = False) -> list[list[int]]:
        """`encode` of many texts, in parallel threads."""
        backend = self._full if allow_control else self._plain
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, padded embedding rows nothing."""
        for i in ids:
            if i < 0:
                raise ValueError(f"token id {i} is negative: leave out ignored labels")
        return self._full.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; raises ValueError outside the vocabulary."""
        token = self._full.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        if token in self.control:
            return token.encode()
        return bytes(CHAR_TO_BYTE[char] for char in token)

    @property
    def merges(self) -> list[Merge]:
        """The merges in order, as bytes."""
        merges = json.loads(self._full.to_str())["model"]["merges"]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        return [(_as_bytes(left), _as_bytes(right)) for left, right in pairs]

    @property
    def vocab_size(self) -> int:
        """Rows in use: regular plus control tokens."""
        return self._full.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        regular = self.vocab_size - len(self.control)
        return f"Tokenizer({regular:,} regular + {len(self.control)} control tokens)"


def _as_text(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in token)


def _as_bytes(token: str) -> bytes:
    return bytes(CHAR_TO_BYTE[char] for char in token)
