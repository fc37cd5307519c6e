"""C files of this package, compiled for the machine at hand and loaded through ctypes.

The first use on a machine runs its C compiler (a second or two) and keeps the library in the cache.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from qwenlib import assets

_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
# Compilers differ in what they know; the first set that works is taken. Without OpenMP: one thread.
_CHOICES = (
    ("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",),
    ("-march=native",), ("-mcpu=native",), (),
)  # fmt: skip


@functools.cache
def compiled(source: Path, instead: str = "PyTorch's slower way") -> ctypes.CDLL | None:
    """The library of a C file; None, and the way named by `instead`, without a C compiler.

    A warning says why. Also None, without one, with QWENLIB_NATIVE=0.
    """
    if os.environ.get("QWENLIB_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(library_file(source)))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{source.name} does not run here, {instead} is taken: {error} "
            "(QWENLIB_NATIVE=0 chooses it without this warning)",
            stacklevel=3,
        )
        return None


def library_file(source: Path) -> Path:
    """The library for this processor, compiler and source, from the cache or newly made.

    Its name ends with its own hash. Loading a damaged file can end the process, so one that has
    another hash is made again.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler found; install gcc or clang, or name one in CC")
    processor = platform.processor() + platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        processor += "".join(sorted({x for x in lines if x.startswith(("flags", "Features"))}))
    texts = [p.read_text(encoding="utf-8") for p in (source, *sorted(source.parent.glob("*.h")))]
    parts = *texts, compiler, str((_FLAGS, _CHOICES)), processor
    key = f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    folder = assets.cache_dir() / "native"
    for made in folder.glob(f"{key}-*.so"):
        if made.name == _name(key, made):
            return made
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "native.so"
        for choice in _CHOICES:
            flags = *_FLAGS, *choice, str(source), "-o", str(made), "-lm"
            run = subprocess.run(
                [*shlex.split(compiler), *flags], capture_output=True, errors="replace", timeout=120
            )
            if run.returncode == 0 and made.exists():
                target = folder / _name(key, made)
                os.replace(made, target)  # whole or not at all, whoever else compiles
                return target
    raise OSError(f"{compiler} failed with status {run.returncode}: {run.stderr.strip()[-500:]}")


def _name(key: str, made: Path) -> str:
    return f"{key}-{assets.sha256_of(made)[:16]}.so"
