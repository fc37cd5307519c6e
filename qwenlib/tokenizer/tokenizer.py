"""The tokenizer: byte-level BPE plus 22 control tokens, stored as a Hugging Face folder.

Encoding runs in gigatoken where the pre-tokenizer is Qwen's, else in the `tokenizers` library;
training, vocabulary and template are ours.
"""

import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from qwenlib.tokenizer.bpe import (
    PRETOKEN_PATTERN,
    Merge,
    as_bytes,
    as_text,
    merges_from_ranks,
    vocabulary,
)
from qwenlib.tokenizer.chat import CHAT_TEMPLATE, find_default_system
from qwenlib.tokenizer.control import CONTROL_TOKENS, END_OF_TEXT, IM_END, IM_START
from qwenlib.tokenizer.encoder import Encoder
from qwenlib.tokenizer.normal_form import check_text, normalise
from qwenlib.tokenizer.offsets import token_places
from qwenlib.tokenizer.stream import StreamDecoder


class Tokenizer:
    """Text to ids and back. Control-token strings in text are text unless `allow_control` is set.

    Build one with `from_merges`, `from_pretrained`, `from_gguf`, `from_tiktoken` or `from_asset`.
    """

    def __init__(
        self, tokenizer_json: dict, chat_template: str = CHAT_TEMPLATE,
        eos_token: str = IM_END, pad_token: str = END_OF_TEXT,
    ) -> None:  # fmt: skip
        self._full = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json))
        # The same model without added tokens cannot produce a control id, whatever the text says.
        plain = {**tokenizer_json, "added_tokens": []}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.chat_template = chat_template
        self.control: dict[str, int] = {
            token["content"]: token["id"] for token in tokenizer_json["added_tokens"]
        }
        if eos_token == END_OF_TEXT:
            eos_token = IM_END  # base releases name the end of a document; here a turn ends
        for name in (END_OF_TEXT, IM_START, IM_END, eos_token, pad_token):
            if name not in self.control:
                raise ValueError(f"tokenizer.json has no {name}: not a Qwen2.5 layout")
        self.special_ids = frozenset(
            token["id"] for token in tokenizer_json["added_tokens"] if token["special"]
        )
        self.end_of_text_id: int = self.control[END_OF_TEXT]
        self.pad_token_id: int = self.control[pad_token]
        self.im_start_id: int = self.control[IM_START]
        self.eos_token_id: int = self.control[eos_token]

    @classmethod
    def from_merges(cls, merges: Sequence[Merge]) -> "Tokenizer":
        """Tokenizer from trained merges; the control tokens take the ids after the regular ones."""
        vocab = {as_text(token): i for i, token in enumerate(vocabulary(merges))}
        pairs = [(as_text(left), as_text(right)) for left, right in merges]
        added = [AddedToken(t.text, special=t.special, normalized=False) for t in CONTROL_TOKENS]
        return cls(assemble(vocab, pairs, added, *qwen_pipeline()))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Tokenizer":
        """Tokenizer of a Hugging Face folder, a .gguf file, a hub id or a registered name.

        Raises FileNotFoundError where there is no such source or no tokenizer.json in it.
        """
        directory = Path(source).expanduser()
        if not directory.is_dir():
            from qwenlib.model.sources import resolve_model

            if directory.is_file() and directory.suffix == ".gguf":
                return cls.from_gguf(directory)
            directory = resolve_model(source, weights=False)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give a folder written by Tokenizer.save_pretrained or a "
                "Qwen2.5 model folder"
            )
        file, jinja = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if jinja.is_file():
            config["chat_template"] = jinja.read_text(encoding="utf-8")
        chosen = {
            key: value["content"] if isinstance(value, dict) else value
            for key in ("chat_template", "eos_token", "pad_token")
            if (value := config.get(key))
        }
        return cls(json.loads(path.read_text(encoding="utf-8")), **chosen)

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Tokenizer in a GGUF file's metadata; ValueError names the file and the key in the way."""
        from qwenlib.tokenizer.gguf import read_tokenizer

        return cls(**read_tokenizer(path))

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

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot go to another process and is made again there."""
        made = ("_encoder", "_control_pattern")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    @cached_property
    def _encoder(self) -> Encoder | None:
        """The fast way, where it gives the same ids."""
        tokenizer_json = json.loads(self._full.to_str())
        usable = _is_qwen(tokenizer_json) and Encoder.can_build(tokenizer_json)
        return Encoder(tokenizer_json) if usable else None

    @cached_property
    def _control_pattern(self) -> re.Pattern | None:
        """Cuts a text at its control tokens; None where their flags ask for more than that."""
        added = json.loads(self._full.to_str())["added_tokens"]
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        if self._encoder is None or any(token[flag] for token in added for flag in flags):
            return None
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def default_system(self) -> str | None:
        """The system text of a conversation that brings none; None: no system turn is added.

        Found by rendering the chat template; ValueError when that writes no ChatML.
        """
        return find_default_system(self.chat_template)

    def save_tiktoken(self, path: str | Path) -> None:
        """Write the regular tokens as a tiktoken rank file, which `from_tiktoken` reads.

        The format keeps neither merges, pattern nor control tokens: ValueError for a tokenizer that
        is not Qwen's in these, or whose merges do not follow from the ranks.
        """
        tokenizer_json = json.loads(self._full.to_str())
        merges = _merges(tokenizer_json)
        ranks = {as_bytes(token): i for token, i in tokenizer_json["model"]["vocab"].items()}
        tokens = vocabulary(merges)
        if not (
            _is_qwen(tokenizer_json)
            and ranks == {token: i for i, token in enumerate(tokens)}
            and merges_from_ranks(ranks) == merges
        ):
            raise ValueError(
                "a rank file keeps tokens alone, and this tokenizer's ids do not follow from them "
                "(another pre-tokenizer, or merges that ranks cannot tell): use save_pretrained"
            )
        lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
        _write(Path(path), b"".join(lines))

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
            "eos_token": self._full.id_to_token(self.eos_token_id),
            "pad_token": self._full.id_to_token(self.pad_token_id),
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
        code = {}
        if not _is_qwen(tokenizer_json):
            # AutoTokenizer of transformers 5 takes a qwen2 model for one with Qwen's pre-tokenizer,
            # whatever tokenizer.json says, unless the folder names a class of its own.
            module, name = "tokenization", "PlainTokenizer"
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config["auto_map"] = {"AutoTokenizer": [None, f"{module}.{name}"]}
            code[f"{module}.py"] = (
                "from transformers import PreTrainedTokenizerFast\n\n\n"
                f"class {name}(PreTrainedTokenizerFast):\n"
                '    """tokenizer.json as it is."""\n'
            )
        files = code | {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{m}\n" for m in merges),
            "special_tokens_map.json": json.dumps(names, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            # Last: its presence says that the folder is complete.
            "tokenizer.json": json.dumps(tokenizer_json, indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in files.items():
            _write(directory / name, content.encode())

    def encode(self, text: str, allow_control: bool = False) -> list[int]:
        """Ids of `text`; with `allow_control` the control strings become their single ids.

        TypeError for anything but a str, ValueError for a lone surrogate in it.
        """
        if allow_control:
            check_text(text)
            return self._with_control([text], parallel=False)[0]
        normal = normalise(text)
        if self._encoder is not None and self._encoder.can_encode(normal):
            return self._encoder.encode(normal)
        return self._plain.encode(text).ids  # has a normaliser of its own, or none

    def encode_batch(
        self, texts: Iterable[str], allow_control: bool = False, parallel: bool = True
    ) -> list[list[int]]:
        """`encode` of many texts, on every core or (parallel=False) in the calling thread.

        TypeError for a single str in place of several, TypeError and ValueError as `encode`, with
        the number of the text, from 0.
        """
        ways = {True: self._with_control, False: self._without_control}
        return ways[allow_control](_checked(texts), parallel)

    def encode_arrays(self, texts: Iterable[str], parallel: bool = True) -> list[np.ndarray]:
        """`encode_batch` (control strings are text) as arrays of 32-bit ids, sooner."""
        texts = _checked(texts)
        if self._encoder is not None:
            normal = [normalise(text) for text in texts]
            if normal and all(map(self._encoder.can_encode, normal)):
                return self._encoder.encode_arrays(normal, parallel)
        return [np.array(ids, np.uint32) for ids in self._without_control(texts, parallel)]

    def _without_control(self, texts: list[str], parallel: bool) -> list[list[int]]:
        if self._encoder is None:
            if parallel:
                return [encoding.ids for encoding in self._plain.encode_batch_fast(texts)]
            return [self.encode(text) for text in texts]
        normal = [normalise(text) for text in texts]
        can = [self._encoder.can_encode(text) for text in normal]
        fast = iter(self._encoder.encode_all(list(itertools.compress(normal, can)), parallel))
        return [
            next(fast) if fits else self._plain.encode(text).ids for text, fits in zip(normal, can)
        ]

    def _with_control(self, texts: list[str], parallel: bool) -> list[list[int]]:
        if self._control_pattern is None:
            return [self._full.encode(text).ids for text in texts]
        parts = [self._control_pattern.split(text) for text in texts]
        between = [part for split in parts for part in split if part not in self.control]
        encoded = iter(self._without_control(between, parallel))
        out: list[list[int]] = []
        for split in parts:
            out.append([])
            for part in split:
                control = self.control.get(part)
                out[-1] += next(encoded) if control is None else [control]
        return out

    def encode_with_offsets(
        self, text: str, allow_control: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as `encode` gives them, and for each token (start, end) in characters of `text`.

        A token's place covers every character of which it holds a part, and where normal form C
        joins characters, all that were joined.
        """
        check_text(text)
        parts = [text]
        if self._encoder is None or (allow_control and self._control_pattern is None):
            encoding = (self._full if allow_control else self._plain).encode(text)
            return encoding.ids, encoding.offsets
        if allow_control:
            parts = self._control_pattern.split(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for part in parts:
            part_ids = self.encode(part, allow_control)
            if allow_control and part in self.control:
                places = [(0, len(part))]
            else:
                places = token_places(part, [self.token_bytes(i) for i in part_ids])
            ids += part_ids
            offsets += [(at + start, at + end) for start, end in places]
            at += len(part)
        return ids, offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, padded embedding rows nothing."""
        ids = list(ids)
        _refuse_negative(ids)
        return self._full.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind `ids`, whole characters or not; padded embedding rows give none."""
        ids = list(ids)
        _refuse_negative(ids)
        return b"".join(self.token_bytes(i) for i in ids if self._full.id_to_token(i) is not None)

    def stream(self, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder to give ids one by one: it holds back a character until it is whole."""
        return StreamDecoder(self, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; raises ValueError outside the vocabulary."""
        token = self._full.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        if token in self.control:
            return token.encode()
        return as_bytes(token)

    @property
    def merges(self) -> list[Merge]:
        """The merges in order, as bytes."""
        return _merges(json.loads(self._full.to_str()))

    @property
    def vocab_size(self) -> int:
        """Rows in use: regular plus control tokens."""
        return self._full.get_vocab_size(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the ids: tokens, merges, how text is normalised and split."""
        content = json.loads(self._full.to_str())
        parts = (
            sorted(content["model"]["vocab"].items()), sorted(self.control.items()),
            [(left.hex(), right.hex()) for left, right in _merges(content)],
            _without_trim([content["normalizer"], content["pre_tokenizer"]]),
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        regular = self.vocab_size - len(self.control)
        return f"Tokenizer({regular:,} regular + {len(self.control)} control tokens)"


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("encode_batch takes several texts; give [text] or use encode")
    texts = list(texts)
    for number, text in enumerate(texts):
        try:
            check_text(text)
        except (TypeError, ValueError) as error:
            raise type(error)(f"text {number}: {error}") from None
    return texts


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_negative(ids: Sequence[int]) -> None:
    if ids and min(ids) < 0:
        raise ValueError(f"token id {min(ids)} is negative: leave out ignored labels")


def _is_qwen(tokenizer_json: dict) -> bool:
    """Whether text is normalised and split as Qwen does it."""
    bare = tokenizers.Tokenizer(models.BPE())
    bare.normalizer, bare.pre_tokenizer = qwen_pipeline()
    qwen = json.loads(bare.to_str())
    same = [tokenizer_json["normalizer"], tokenizer_json["pre_tokenizer"]]
    return _without_trim(same) == _without_trim([qwen["normalizer"], qwen["pre_tokenizer"]])


def _without_trim(value: Any) -> Any:
    """Without `trim_offsets`, which changes no id."""
    if isinstance(value, dict):
        return {k: _without_trim(v) for k, v in value.items() if k != "trim_offsets"}
    return [_without_trim(v) for v in value] if isinstance(value, list) else value


def qwen_pipeline() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """Qwen's normaliser and pre-tokenizer: NFC, its pattern, then bytes as characters."""
    split = pre_tokenizers.Split(tokenizers.Regex(PRETOKEN_PATTERN), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return normalizers.NFC(), pre_tokenizers.Sequence([split, in_bytes])


def assemble(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[AddedToken],
    normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> dict[str, Any]:  # fmt: skip
    """The content of tokenizer.json: byte-level BPE; added tokens outside `vocab` follow it."""
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False)
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_tokens(added)
    return json.loads(backend.to_str())


def _merges(tokenizer_json: dict) -> list[Merge]:
    merges = tokenizer_json["model"]["merges"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    return [(as_bytes(left), as_bytes(right)) for left, right in pairs]
