"""Tokenizers timed: encoding one text after the other, many at once, and training."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qwenlib.assets import AssetError
from qwenlib.bench.cases import SkipCase, Task, tokens_differ
from qwenlib.data.corpora import documents
from qwenlib.tokenizer import CONTROL_TOKENS, Tokenizer, train_bpe
from qwenlib.tokenizer.bpe import as_text
from qwenlib.tokenizer.tokenizer import qwen_pipeline

_ENDINGS = {".py", ".pyi", ".md", ".rst", ".txt", ".po", ".ipynb", ".js", ".css", ".html", ".h"}


def encode(device, dtype, *, megabytes: dict[str, float], library: str, batch: bool) -> Task:
    """Documents to ids with the real vocabulary.

    megabytes: source -> MB of text. library: "transformers" or "tokenizers", the peer. batch: all
    texts in one call on every thread, else one call a text.
    """
    _limit_threads()
    try:
        texts = [d.text for name, mb in megabytes.items() for d in documents(name, mb)]
        tokenizer = Tokenizer.from_asset()
    except (AssetError, OSError) as error:
        raise SkipCase(f"needs the real vocabulary and texts: {error}") from error
    backend, wrapped = _peers(tokenizer)
    ours: Callable[[], Any] = (
        (lambda: tokenizer.encode_batch(texts))
        if batch
        else (lambda: [tokenizer.encode(text) for text in texts])
    )
    ways: dict[tuple[str, bool], dict[str, Callable[[], Any]]] = {
        ("transformers", True): {"call on a list": lambda: wrapped(texts).input_ids},
        ("transformers", False): {
            "call": lambda: [wrapped(text).input_ids for text in texts],
            "encode": lambda: [wrapped.encode(text) for text in texts],
        },
        ("tokenizers", True): {
            "encode_batch": lambda: [e.ids for e in backend.encode_batch(texts)],
            "encode_batch_fast": lambda: [e.ids for e in backend.encode_batch_fast(texts)],
        },
        ("tokenizers", False): {"encode": lambda: [backend.encode(text).ids for text in texts]},
    }
    return Task(
        ours, ways[library, batch], sum(len(text.encode()) for text in texts) / 1e6, tokens_differ,
        unit="MB/s", library=library,
    )  # fmt: skip


def train(device, dtype, *, megabytes: float, vocab_size: int) -> Task:
    """Text to merges, pre-tokenization included; both sides on every thread."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    _limit_threads()
    texts = list(installed_text(megabytes))
    threads = torch.get_num_threads()

    def theirs() -> list[list[str]]:
        backend = Backend(models.BPE())
        backend.normalizer, backend.pre_tokenizer = qwen_pipeline()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size - len(CONTROL_TOKENS),
                min_frequency=2,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),  # fmt: skip
        )
        return [list(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]

    def ours() -> list[list[str]]:
        merges = train_bpe(texts, vocab_size, workers=threads)
        return [[as_text(left), as_text(right)] for left, right in merges]

    return Task(
        ours, {"BpeTrainer": theirs}, sum(len(text.encode()) for text in texts) / 1e6,
        tokens_differ, unit="MB/s", library="tokenizers",
    )  # fmt: skip


def installed_text(megabytes: float) -> Iterator[str]:
    """Text files of Python and its installed packages, each content once. SkipCase if too few."""
    left, seen = megabytes * 1e6, set()
    for name in ("stdlib", "purelib", "platlib"):
        for path in sorted(Path(sysconfig.get_path(name)).rglob("*")):
            if path.suffix not in _ENDINGS or not path.is_file():
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen or not content:
                continue
            seen.add(digest)
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            left -= len(content)
            if left <= 0:
                return
    raise SkipCase(f"the installed packages hold {left / 1e6:.1f} MB less text than wanted")


def _limit_threads() -> None:
    """The Rust libraries read this when they first use threads."""
    os.environ["RAYON_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def _peers(tokenizer: Tokenizer) -> tuple[Any, Any]:
    """The same vocabulary in `tokenizers` and in transformers' Qwen2 class."""
    import tempfile

    from tokenizers import Tokenizer as Backend
    from transformers import Qwen2Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        content = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        content["added_tokens"] = []  # they would be looked for in every text
        backend = Backend.from_str(json.dumps(content))
        vocab = content["model"]["vocab"]
        merges = [
            tuple(m.split(" ") if isinstance(m, str) else m) for m in content["model"]["merges"]
        ]
    return backend, Qwen2Tokenizer(vocab=vocab, merges=merges)
