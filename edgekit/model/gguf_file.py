"""The GGUF container: metadata and a table of tensors, read without trusting a byte of it.

    "GGUF" | version | tensor count | key count | keys | tensors' names, shapes, types, offsets | padding | data

Every length is checked against the file before it is used, so time and memory are bounded by the header's own size.
Data stay in the memory-mapped file. `gguf.GGUFReader` reads the same but loops over counts that it does not check, and
takes 2.0 s for a vocabulary of 49,152 tokens where this takes 0.13 s (measured, n = 1, two-core machine).

Not supported: big-endian files, version 1, nested arrays, models split over several files.
Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edgekit.errors import ModelError

T = TypeVar("T")
Value = str | int | float | bool | list[str] | NDArray[Any]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list of strings"}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in NumPy's order (rows first), `offset` counts from the file's start."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """An open file: metadata by key, tensors by name. Arrays of strings are lists, other arrays NumPy views."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]
    content: NDArray[np.uint8]

    def get(self, key: str, kind: type[T]) -> T | None:
        """A value of the metadata, None when it is absent. Raises ModelError when it is no `kind`."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(f"{self.path}: {key} must be {KINDS.get(kind, 'a list of numbers')}: got {value!r:.40}")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """A value of the metadata that the model cannot be read without. Raises ModelError when it is absent."""
        value = self.get(key, kind)
        if value is None:
            raise ModelError(f"{self.path}: the key {key} is missing; the file is incomplete, convert the model again")
        return value

    def data(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes as stored, (..., bytes of a row), a view of the file."""
        tensor = self.tensors[name]
        return self.content[tensor.offset : tensor.offset + tensor.size_bytes].reshape(*tensor.shape[:-1], -1)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file. Raises ModelError: not GGUF, cut short, or not what the specification allows."""
    try:
        content: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as problem:  # an empty file cannot be mapped: ValueError
        raise ModelError(f"{path} must be a readable GGUF file: {problem}") from problem
    cursor = _Cursor(path, content.data)
    if bytes(cursor.content[:4]) != MAGIC:
        raise ModelError(f"{path} must be a GGUF file: it begins with {bytes(cursor.content[:4])!r}, not {MAGIC!r}")
    cursor.position = 4
    version, tensor_count, key_count = cursor.unpack("<IQQ")
    if version not in VERSIONS:
        raise ModelError(f"{path} must be GGUF version 2 or 3, little endian: it says {version}; convert it again")
    metadata = _table(cursor, key_count, _key)
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ModelError(
            f"a model must be one GGUF file: {path} is one of {parts} parts; join them with `llama-gguf-split --merge`"
        )
    infos = _table(cursor, tensor_count, _tensor_info)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment must be a power of two: got {alignment!r:.40}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _place(path, name, info, start, len(content)) for name, info in infos.items()}
    return GgufFile(path, metadata, tensors, content)


@dataclass
class _Cursor:
    """A position in the file that never leaves it."""

    path: Path
    content: memoryview
    position: int = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.content) - self.position:
            raise ModelError(
                f"{self.path} is cut short or damaged: {size} bytes are declared at byte {self.position}"
                f" of {len(self.content)}; fetch the file again"
            )
        self.position += size
        return self.content[self.position - size : self.position]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        begin = self.position
        (size,) = self.unpack("<Q")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError as problem:
            raise ModelError(f"{self.path} is damaged: the text at byte {begin} is not UTF-8 ({problem})") from problem

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        value: Value = self.numbers(kind, 1)[0].item()
        return value

    def array(self) -> Value:
        kind, count = self.unpack("<IQ")
        if kind != STRING:
            return self.numbers(kind, count)
        return [self.string() for _ in range(count)]  # each string takes 8 bytes, so the file's end bounds the loop

    def numbers(self, kind: int, count: int) -> NDArray[Any]:
        if kind not in SCALARS:
            raise ModelError(f"{self.path}: the value at byte {self.position} has type {kind}, which is not supported")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


@dataclass(frozen=True)
class _Info:
    """A tensor as the header declares it, with `offset` from the start of the data."""

    type: int
    shape: tuple[int, ...]
    offset: int


def _table(cursor: _Cursor, count: int, read: Callable[[_Cursor], T]) -> dict[str, T]:
    """`count` names, each followed by what `read` reads."""
    table: dict[str, T] = {}
    for _ in range(count):
        name = cursor.string()
        if name in table:
            raise ModelError(f"{cursor.path} is damaged: the name {name!r:.80} occurs twice")
        table[name] = read(cursor)
    return table


def _key(cursor: _Cursor) -> Value:
    return cursor.value(cursor.unpack("<I")[0])


def _tensor_info(cursor: _Cursor) -> _Info:
    (dimensions,) = cursor.unpack("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ModelError(f"{cursor.path} is damaged: a tensor has {dimensions} dimensions, at most 4 are allowed")
    *shape, kind, offset = cursor.unpack(f"<{dimensions}QIQ")
    return _Info(kind, tuple(reversed(shape)), offset)


def _place(path: Path, name: str, info: _Info, start: int, file_size: int) -> GgufTensor:
    """Check a declared tensor against the file's size."""
    try:
        kind = GGMLQuantizationType(info.type)
    except ValueError:
        raise ModelError(
            f"{path}: tensor {name!r:.80} has the unknown type {info.type}; update the gguf package"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block or 0 in info.shape:
        raise ModelError(f"{path}: tensor {name!r:.80} of type {kind.name} cannot have the shape {info.shape}")
    size = math.prod(info.shape) // block * block_bytes
    offset = start + info.offset
    if offset + size > file_size:
        raise ModelError(
            f"{path} is cut short or damaged: tensor {name!r:.80} ends at byte {offset + size} of {file_size};"
            " fetch the file again"
        )
    return GgufTensor(kind, info.shape, offset, size)
