"""What can stand where a float matrix stood: dense values, or integer codes with a scale for each block.

A quantised matrix of shape (out, in) is stored in blocks of `block` neighbouring columns of one row, the last block
padded with zeros. The value of a code q in a block with scale s, and a zero point z or a minimum m, is

    w = s * (q - z),        z = 2**(bits - 1) where the matrix is symmetric
    w = s * q + m           where it has minima, as the blocks of many GGUF types do.

Codes are packed along the row, the low bits first: byte j of a block holds codes 2j and 2j + 1 at 4 bits, code j at 8.
This is the layout of onnxruntime's MatMulNBits, so an export copies bytes and converts nothing but the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Dense:
    """Plain values: (out, in) float32."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def size_bytes(self) -> int:
        """Bytes that the matrix takes in its folder."""
        return self.values.nbytes

    def dense(self) -> Floats:
        """The values themselves, (out, in) float32."""
        return self.values


@dataclass(frozen=True)
class Quantized:
    """Codes (out, blocks, block * bits / 8) uint8, scales (out, blocks) float16, and zero points or minima.

    `zeros` is (out, ceil(blocks * bits / 8)) uint8, packed as the codes are, `minima` (out, blocks) float16; at most
    one of them is there, and neither when the matrix is symmetric. `columns` is the matrix's width without padding.
    """

    codes: Bytes
    scales: Halves
    zeros: Bytes | None
    bits: int
    block: int
    columns: int
    minima: Halves | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != np.uint8 or self.codes.ndim != 3 or self.scales.ndim != 2:
            raise ModelError(
                f"codes must be uint8 (out, blocks, bytes) with scales (out, blocks): got {self.codes.dtype}"
                f" {self.codes.shape} and {self.scales.shape}"
            )
        rows, blocks = self.scales.shape
        if self.bits not in (4, 8) or self.block <= 0 or self.block * self.bits % 8:
            raise ModelError(f"codes must have 4 or 8 bits in whole bytes: got {self.bits} bits, block {self.block}")
        wanted = (rows, blocks, self.block * self.bits // 8)
        if self.codes.shape != wanted or blocks != -(-self.columns // self.block):
            raise ModelError(
                f"codes of {self.columns} columns in blocks of {self.block} must have shape {wanted}"
                f" with {-(-self.columns // self.block)} blocks: got {self.codes.shape} and {blocks} scales a row"
            )
        if self.zeros is not None and self.zeros.shape != (rows, -(-blocks * self.bits // 8)):
            raise ModelError(f"zero points of {blocks} blocks must be packed by row: got shape {self.zeros.shape}")
        if self.minima is not None and (self.zeros is not None or self.minima.shape != self.scales.shape):
            raise ModelError(f"minima must stand alone, one a scale: got {self.minima.shape} for {self.scales.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def size_bytes(self) -> int:
        """Bytes that the matrix takes in its folder."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.minima) if part is not None)

    def rows(self, part: slice) -> Quantized:
        """Some of the rows, as a matrix of their own."""
        return replace(
            self,
            codes=self.codes[part],
            scales=self.scales[part],
            zeros=None if self.zeros is None else self.zeros[part],
            minima=None if self.minima is None else self.minima[part],
        )

    def dense(self) -> Floats:
        """The values that the codes stand for, (out, in) float32."""
        rows, blocks = self.scales.shape
        codes = unpack(self.codes, self.bits).reshape(rows, blocks, self.block).astype(np.float32)
        if self.zeros is not None:
            codes -= unpack(self.zeros, self.bits)[:, :blocks, None]
        elif self.minima is None:
            codes -= float(1 << (self.bits - 1))
        codes *= self.scales.astype(np.float32)[:, :, None]
        if self.minima is not None:
            codes += self.minima.astype(np.float32)[:, :, None]
        return np.ascontiguousarray(codes.reshape(rows, -1)[:, : self.columns])


Weight = Dense | Quantized


def concatenate(weights: Sequence[Weight]) -> Weight | None:
    """Matrices over the same columns stacked by rows, or None when they are stored in different ways."""
    if len(weights) == 1:
        return weights[0]
    dense = [weight for weight in weights if isinstance(weight, Dense)]
    if len(dense) == len(weights):
        return Dense(np.concatenate([weight.values for weight in dense]))
    parts = [weight for weight in weights if isinstance(weight, Quantized)]
    if len(parts) != len(weights) or len({_layout(part) for part in parts}) != 1:
        return None
    zeros = [part.zeros for part in parts if part.zeros is not None]
    minima = [part.minima for part in parts if part.minima is not None]
    return replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate(zeros) if zeros else None,
        minima=np.concatenate(minima) if minima else None,
    )


def _layout(weight: Quantized) -> tuple[object, ...]:
    return weight.bits, weight.block, weight.columns, weight.zeros is None, weight.minima is None


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes (..., n) of `bits` bits along the last axis, low bits first; an odd end is padded with zero."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Undo `pack`: (..., n) bytes to (..., n * 8 / bits) codes."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes
