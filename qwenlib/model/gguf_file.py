"""The GGUF container: metadata and tensor table, every read checked against the file's length.

Layout (llama.cpp, ggml/docs/gguf.md): header, metadata, tensor table, padding, tensor data, all
little-endian. gguf's own GGUFReader slices a memory map, where a cut file gives short arrays
without an error, and takes 7 s and 480 MB for Qwen's vocabulary; this takes 0.4 s.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

READABLE = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table; `shape` in torch's order, `start` in bytes of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def row_bytes(self) -> int:
        weights, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // weights * size


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensor table of a GGUF file whose tensor data is known to be all there."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Everything before the tensor data. ValueError: no GGUF, cut, damaged or not readable."""
    path = Path(path)
    with open(path, "rb") as file:
        return _Header(path, file).read()


class _Header:
    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size, self.at = path, file, path.stat().st_size, 0
        self.inside = "the header"  # what is being read, for errors

    def read(self) -> GGUFFile:
        if self.file.peek(4)[:4] != b"GGUF":
            self.fail("is not a GGUF file: give a .gguf file or a model folder")
        self.take(4)
        version = self.number("I")
        if version & 0xFFFF == 0:
            self.fail("is big-endian: convert it with llama.cpp's gguf_convert_endian.py")
        if version not in (2, 3):
            self.fail(f"has GGUF version {version}, 2 and 3 are known: convert the model again")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        metadata = self.metadata(n_keys)
        if metadata.get("split.count") not in (None, 0, 1):
            self.fail("is one part of a split model: join the parts with llama-gguf-split --merge")
        table = [self.tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"is damaged: general.alignment is {alignment}, no power of two")
        data = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in table:
            if name in tensors:
                self.fail(f"is damaged: it has two tensors {name}")
            tensors[name] = tensor = GGUFTensor(shape, kind, data + offset)
            if offset % alignment:
                self.fail(f"is damaged: {name} starts at {offset}, no multiple of {alignment}")
            self.inside = f"the data of {name}"
            self.check(tensor.start + math.prod(shape[:-1]) * tensor.row_bytes)
        return GGUFFile(self.path, metadata, tensors)

    def metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            self.inside = f"metadata key {i + 1} of {n_keys}"
            key = self.text()
            self.inside = f"the metadata key {key}"
            if key in metadata:
                self.fail(f"is damaged: it has the metadata key {key} twice")
            metadata[key] = self.value(self.number("I"))
        return metadata

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        self.inside = "the tensor table"
        name, n_dims = self.text(), self.number("I")
        if not 1 <= n_dims <= 4:
            self.fail(f"is damaged: {name} has {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        code, offset = self.number("I"), self.number("Q")
        kind = next((k for k in GGMLQuantizationType if k == code), None)
        if kind is None or kind.name not in READABLE:
            label = kind.name if kind is not None else f"number {code}"
            self.fail(
                f"stores {name} as type {label}: quantise the model to one of {', '.join(READABLE)}"
            )
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            self.fail(f"is damaged: rows of {name} have {shape[-1]} weights, no {kind.name} blocks")
        return name, shape, kind, offset

    def value(self, code: int) -> Any:
        if code == GGUFValueType.STRING:
            return self.text()
        if code == GGUFValueType.ARRAY:
            code, count = self.number("I"), self.number("Q")
            if code in _FORMATS:
                dtype = np.dtype("<" + _FORMATS[code])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(code) for _ in range(count)]
        if code not in _FORMATS:
            self.fail(f"is damaged: {self.inside} has the unknown type {code}")
        return self.number(_FORMATS[code])

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"is damaged: a text in {self.inside} is not UTF-8")

    def take(self, n: int) -> bytes:
        self.check(self.at + n)
        self.at += n
        return self.file.read(n)

    def check(self, end: int) -> None:
        if end > self.size:
            self.fail(f"is cut off or damaged: {self.inside} needs {end:,} bytes of file, "
                      f"there are {self.size:,}; get it again")  # fmt: skip

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path} {problem}")
