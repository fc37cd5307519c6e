"""One name for any model: a folder, a GGUF file, a hub id or a registered name becomes a folder."""

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qwenlib import assets

# Name -> asset: a GGUF file that `assets.fetch` brings.
NAMES = {"smollm2-135m": "smollm2-135m-instruct"}
# Part of a converted folder's name: count up when a change makes old folders wrong.
_CONVERSION = 1
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def resolve_model(source: str | Path, weights: bool = True) -> Path:
    """The local Hugging Face folder of a model, downloaded or converted when it is not here yet.

    source: a folder, a .gguf file, a hub id "owner/name" or one of `NAMES`; what exists on disk
    goes first. weights=False leaves a hub model's weights where they are. Raises
    FileNotFoundError where there is no such model, OSError or AssetError where it cannot be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is one file: give its folder, or a .gguf file")
        return _converted(path, *_place_of(path))
    name = str(source)
    if name in NAMES:
        file = assets.fetch(NAMES[name])
        return _converted(file, file.parent, f"hf-{_CONVERSION}")
    # "./x/y" and "~/x" can only be meant as paths.
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix != ".gguf":
        return _from_hub(name, weights)
    hint = f" (near: {', '.join(near)})" if (near := _nearest(path)) else ""
    raise FileNotFoundError(
        f"there is no model {name!r}{hint}; give a model folder, a .gguf file, "
        f"a hub id 'owner/name', or a name: {', '.join(NAMES)}"
    )


def _nearest(path: Path) -> list[str]:
    """What `path` may have meant: registered names and the neighbours of a missing file."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*NAMES, *names], n=3)
    return [entry if entry in NAMES else str(path.parent / entry) for entry in near]


def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    off = ("", "0", "false", "no")
    switches = ("QWENLIB_OFFLINE", "HF_HUB_OFFLINE")
    switch = next((key for key in switches if os.environ.get(key, "").lower() not in off), None)
    try:
        folder = snapshot_download(
            name,
            allow_patterns=[*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())],
            ignore_patterns=["*/*"],  # second copies of the weights, say original/
            local_files_only=switch is not None,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = f"{switch} is set" if switch else (str(error).splitlines() or [repr(error)])[0]
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub's model of that name cannot be had: {why}\n"
            + ("Fix: unset it, " if switch else "Fix: check the name and the network, ")
            + "or give the path of a model folder or a .gguf file."
        ) from error
    return Path(folder)


def _place_of(file: Path) -> tuple[Path, str]:
    """Cache folder of a user's GGUF file, and a name that changes with the file."""
    stat, path = file.stat(), str(file.resolve())
    home = assets.cache_dir() / "gguf" / f"{file.stem}-{_short_hash(path)}"
    return home, f"hf-{_CONVERSION}-{_short_hash(f'{stat.st_size} {stat.st_mtime_ns}')}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _converted(file: Path, home: Path, name: str) -> Path:
    """The folder `home/name` made from a GGUF file; it appears whole or not at all."""
    folder = home / name
    if folder.is_dir():
        return folder
    try:
        with _work_folder(home) as work:
            if not folder.is_dir():  # another process may have made it while this one waited
                _convert(file, work / name)
                os.replace(work / name, folder)
    except OSError as error:
        raise assets.AssetError(
            f"{file}: cannot write the converted model to {home}: {error}\n"
            "Fix: free some space there, or set QWENLIB_CACHE to a folder you can write to."
        ) from error
    return folder


def _convert(file: Path, folder: Path) -> None:
    from qwenlib.model.checkpoint import save_pretrained
    from qwenlib.model.gguf import load_gguf
    from qwenlib.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(file)  # first: it says no before the weights are read
    model = load_gguf(file)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{file}: {tokenizer.vocab_size} tokens in tokenizer.ggml.tokens, but "
                         f"{model.config.vocab_size} rows in token_embd.weight")  # fmt: skip
    save_pretrained(model, folder, tokenizer)


@contextlib.contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    """A new folder inside `home` for one process at a time; killed ones' folders are removed."""
    from filelock import FileLock

    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".convert.lock"):
        for leftover in home.glob(".convert-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=home) as work:
            yield Path(work)
