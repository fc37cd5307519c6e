"""A GGUF file's tokenizer as the arguments of `Tokenizer`.

llama.cpp stores tokens, their types and merges, and of the pre-tokenizer only a name
(`tokenizer.ggml.pre`); each name here stands for what the released tokenizer does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, pre_tokenizers

from qwenlib.tokenizer.control import CONTROL_TOKENS, END_OF_TEXT, IM_END, IM_START
from qwenlib.tokenizer.tokenizer import assemble, qwen_pipeline


def _gpt2_pipeline() -> tuple[None, pre_tokenizers.PreTokenizer]:
    return None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_pipeline() -> tuple[None, pre_tokenizers.PreTokenizer]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return None, pre_tokenizers.Sequence([digits, _gpt2_pipeline()[1]])


_PIPELINES: dict[str, Callable[[], tuple]] = {
    "qwen2": qwen_pipeline, "smollm": _smollm_pipeline, "gpt-2": _gpt2_pipeline,
}  # fmt: skip
_ADDED_TYPES = {TokenType.CONTROL, TokenType.USER_DEFINED}
_KNOWN_TYPES = _ADDED_TYPES | {TokenType.NORMAL, TokenType.UNUSED}


def read_tokenizer(path: str | Path) -> dict[str, Any]:
    """Arguments of `Tokenizer` from a GGUF file; a ValueError names the file and the key."""
    from qwenlib.model.gguf_file import read_gguf

    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in read_gguf(path).metadata.items()
        if key.startswith("tokenizer.")
    }

    def get(key: str) -> Any:
        if key not in metadata:
            raise ValueError(f"{path} lacks the metadata key tokenizer.{key}")
        return metadata[key]

    if (model := get("ggml.model")) != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {model!r}, only byte-level 'gpt2' is read"
        )
    if (pre := get("ggml.pre")) not in _PIPELINES:
        raise ValueError(f"{path}: tokenizer.ggml.pre is {pre!r}; known: {', '.join(_PIPELINES)}")
    for key, value in metadata.items():
        if key.startswith(("ggml.add_", "ggml.remove_")) and value:
            raise ValueError(f"{path}: tokenizer.{key} is on, which this tokenizer does not do")
    tokens, types = get("ggml.tokens"), get("ggml.token_type")
    if len(types) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries, "
                         f"tokenizer.ggml.tokens {len(tokens)}")  # fmt: skip
    arguments: dict[str, Any] = {}
    for name, key in (("eos_token", "ggml.eos_token_id"), ("pad_token", "ggml.padding_token_id")):
        if key in metadata:
            place = metadata[key]
            if not 0 <= place < len(tokens) or types[place] not in _ADDED_TYPES:
                raise ValueError(f"{path}: tokenizer.{key} is {place}, which is no control token")
            arguments[name] = tokens[place]
    added = {token for token, kind in zip(tokens, types) if kind in _ADDED_TYPES}
    for token in (END_OF_TEXT, IM_START, IM_END):
        if token not in added:
            raise ValueError(
                f"{path}: tokenizer.ggml.tokens has no control token {token}: no ChatML model"
            )
    if "chat_template" in metadata:
        arguments["chat_template"] = metadata["chat_template"]
    try:
        arguments["tokenizer_json"] = _tokenizer_json(tokens, types, get("ggml.merges"), pre)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return arguments


def _tokenizer_json(tokens: list[str], types: list[int], merges: list[str], pre: str) -> dict:
    ids = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    if len(ids) + types.count(TokenType.UNUSED) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens names a token twice")
    if set(types) - _KNOWN_TYPES:
        raise ValueError(f"tokenizer.ggml.token_type holds {sorted(set(types) - _KNOWN_TYPES)}")
    regular = {token: i for token, i in ids.items() if types[i] == TokenType.NORMAL}
    control = [token for token in ids if token not in regular]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= regular.keys():
            raise ValueError(f"tokenizer.ggml.merges: {' '.join(pair)!r} joins no regular tokens")
    # The converter marks every <|...|> as control; the releases say which are special.
    released = {token.text: token.special for token in CONTROL_TOKENS}
    added = [
        AddedToken(
            token,
            special=released.get(token, types[ids[token]] == TokenType.CONTROL),
            normalized=False,
        )
        for token in control
    ]
    # Qwen's control tokens follow the regular ones and stay out of the model's vocabulary; others
    # have their place in it.
    follow = [ids[token] for token in (*regular, *control)] == list(range(len(ids)))
    return assemble(regular if follow else ids, pairs, added, *_PIPELINES[pre]())
