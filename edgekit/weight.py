"""What can stand where a float matrix stood: dense values, integer codes with a scale for each block, or a product.

A quantised matrix of shape (out, in) is stored in blocks of `block` neighbouring columns of one row, the last block
padded. The value of a code q in a block with scale s, and a zero point z or a minimum m, is

    w = s * (q - z),        z = 2**(bits - 1) where the matrix is symmetric
    w = s * q + m           where it has minima, as the blocks of many GGUF types do.

Scales and minima are float16; or they are codes of 8 bits themselves, S from 0 to 255 and M from -128 to 127, with one
or two float16 steps a row: s = S * step[0] and m = M * step[1]. Both products are exact in float32.

Codes are packed along the row in a stream of bits, the low ones first: the code of column i of a block holds the bits
from i * bits on, and the first bit of a byte is its lowest. So byte j of a block holds codes 2j and 2j + 1 at 4 bits,
code j at 8. That is the layout of onnxruntime's MatMulNBits, which takes 2, 4 and 8 bits.

A factored matrix is a matrix product operator: the product over bonds c_1 ... c_(N-1) of N small matrices,

    W[(o_1 ... o_N), (i_1 ... i_N)] = sum_c  prod_k  M_k[(c_(k-1), o_k), (i_k, c_k)],       c_0 = c_N = 1

each dense or quantised. Low rank W = A B is the case of the sites (out, 1) and (1, in). To apply it to x, the factors
are taken from the last to the first, each as an ordinary linear from (i_k, c_k) to (c_(k-1), o_k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]
SignedBytes = NDArray[np.int8]

BITS = (2, 3, 4, 5, 6, 8)  # a code may have
EIGHT = 8  # codes of any size fill whole bytes together


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

    def rows(self, part: slice | NDArray[np.int64]) -> Dense:
        """Some of the rows, as a matrix of their own."""
        return Dense(self.values[part])

    def dense(self) -> Floats:
        """The values themselves, (out, in) float32."""
        return self.values


@dataclass(frozen=True)
class Quantized:
    """Codes (out, blocks, block * bits / 8) uint8, scales (out, blocks), and zero points or minima.

    `zeros` is (out, ceil(blocks * bits / 8)) uint8, packed as the codes are, `minima` (out, blocks); at most one of
    them is there, and neither when the matrix is symmetric. Scales and minima are float16 without `steps`; with `steps`
    they are uint8 and int8, and steps is float16 (out, 1), or (out, 2) where there are minima. `columns` is the
    matrix's width without padding.
    """

    codes: Bytes
    scales: Halves | Bytes
    zeros: Bytes | None
    bits: int
    block: int
    columns: int
    minima: Halves | SignedBytes | None = None
    steps: Halves | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != np.uint8 or self.codes.ndim != 3 or self.scales.ndim != 2:
            raise ModelError(
                f"codes must be uint8 (out, blocks, bytes) with scales (out, blocks): got {self.codes.dtype}"
                f" {self.codes.shape} and {self.scales.shape}"
            )
        rows, blocks = self.scales.shape
        if self.bits not in BITS or self.block <= 0 or self.block * self.bits % 8:
            raise ModelError(
                f"codes must have {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits in whole bytes: got {self.bits}"
                f" bits, block {self.block}"
            )
        wanted = (rows, blocks, self.block * self.bits // 8)
        if self.codes.shape != wanted or blocks != -(-self.columns // self.block):
            raise ModelError(
                f"codes of {self.columns} columns in blocks of {self.block} must have shape {wanted}"
                f" with {-(-self.columns // self.block)} blocks: got {self.codes.shape} and {blocks} scales a row"
            )
        if self.zeros is not None and (
            self.zeros.dtype != np.uint8 or self.zeros.shape != (rows, -(-blocks * self.bits // 8))
        ):
            raise ModelError(
                f"zero points of {blocks} blocks must be packed by row: got {self.zeros.dtype} {self.zeros.shape}"
            )
        if self.minima is not None and (self.zeros is not None or self.minima.shape != self.scales.shape):
            raise ModelError(f"minima must stand alone, one a scale: got {self.minima.shape} for {self.scales.shape}")
        self._check_types(rows)

    def _check_types(self, rows: int) -> None:
        kinds = [str(part.dtype) for part in (self.scales, self.minima) if part is not None]
        allowed = ["float16", "float16"] if self.steps is None else ["uint8", "int8"]
        if kinds != allowed[: len(kinds)]:
            raise ModelError(
                "scales and minima must be float16, or uint8 and int8 with steps: got"
                f" {' and '.join(kinds)} {'without' if self.steps is None else 'with'} steps"
            )
        if self.steps is not None and (self.steps.dtype != np.float16 or self.steps.shape != (rows, len(kinds))):
            raise ModelError(
                f"steps of {rows} rows must be float16 {(rows, len(kinds))}: got {self.steps.dtype} {self.steps.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def size_bytes(self) -> int:
        """Bytes that the matrix takes in its folder."""
        parts = (self.codes, self.scales, self.zeros, self.minima, self.steps)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, part: slice | NDArray[np.int64]) -> Quantized:
        """Some of the rows, as a matrix of their own."""
        return replace(
            self,
            codes=self.codes[part],
            scales=self.scales[part],
            zeros=None if self.zeros is None else self.zeros[part],
            minima=None if self.minima is None else self.minima[part],
            steps=None if self.steps is None else self.steps[part],
        )

    def block_scales(self) -> Floats:
        """The scales that are meant, (out, blocks) float32."""
        return restored(self.scales, None if self.steps is None else self.steps[:, :1])

    def block_minima(self) -> Floats | None:
        """The minima that are meant, (out, blocks) float32, where there are some."""
        return None if self.minima is None else restored(self.minima, None if self.steps is None else self.steps[:, 1:])

    def dense(self) -> Floats:
        """The values that the codes stand for, (out, in) float32."""
        rows, blocks = self.scales.shape
        codes = unpack(self.codes, self.bits).reshape(rows, blocks, self.block).astype(np.float32)
        if self.zeros is not None:
            codes -= unpack(self.zeros, self.bits)[:, :blocks, None]
        elif self.minima is None:
            codes -= float(1 << (self.bits - 1))
        codes *= self.block_scales()[:, :, None]
        if (minima := self.block_minima()) is not None:
            codes += minima[:, :, None]
        return np.ascontiguousarray(codes.reshape(rows, -1)[:, : self.columns])


def restored(values: Halves | Bytes | SignedBytes, step: Halves | None) -> Floats:
    """Scales or minima as float32, from float16 or from codes (rows, blocks) and their step (rows, 1); exact."""
    exact = values.astype(np.float32)
    if step is not None:
        exact *= step.astype(np.float32)
    return exact


@dataclass(frozen=True)
class Factored:
    """factors[k]: (c_(k-1) * o_k, i_k * c_k); sites[k]: (o_k, i_k). See the module. Raises ModelError: no fit."""

    factors: tuple[Dense | Quantized, ...]
    sites: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if len(self.sites) < 2 or len(self.sites) != len(self.factors) or any(len(site) != 2 for site in self.sites):
            raise ModelError(
                f"a factored matrix must have a factor for each of two or more sites (out, in): got"
                f" {len(self.factors)} factors for {self.sites}"
            )
        before = 1
        for factor, (o, i) in zip(self.factors, self.sites, strict=True):
            rows, columns = factor.shape
            if min(o, i) < 1 or rows != before * o or columns % i or not columns:
                raise ModelError(
                    f"factors must fit their sites: one of {factor.shape} at a site {(o, i)} behind a bond of {before}"
                )
            before = columns // i
        if before != 1:
            raise ModelError(f"the last factor must end in a bond of 1: it ends in {before}")

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(o for o, _ in self.sites), math.prod(i for _, i in self.sites)

    @property
    def bonds(self) -> tuple[int, ...]:
        """c_1 ... c_(N-1): the bond dimensions; of a low-rank matrix its rank."""
        pairs = zip(self.factors[:-1], self.sites[:-1], strict=True)
        return tuple(factor.shape[1] // i for factor, (_, i) in pairs)

    @property
    def size_bytes(self) -> int:
        """Bytes that the factors take in their folder."""
        return sum(factor.size_bytes for factor in self.factors)

    @property
    def is_low_rank(self) -> bool:
        """Whether it is A B, which is applied without turning axes."""
        return len(self.sites) == 2 and self.sites[0][1] == self.sites[1][0] == 1

    @property
    def multiplications(self) -> int:
        """What applying the factors to one vector takes, last factor first."""
        total, behind, inputs = 0, 1, self.shape[1]
        for factor, (o, i) in zip(reversed(self.factors), reversed(self.sites), strict=True):
            inputs //= i
            total += math.prod(factor.shape) * inputs * behind
            behind *= o
        return total

    def dense(self) -> Floats:
        """The product, (out, in) float32; made in float32, as the runtime multiplies."""
        product = np.ones((1, 1, 1), np.float32)  # (bond, outs so far, ins so far)
        for factor, (o, i) in zip(reversed(self.factors), reversed(self.sites), strict=True):
            bond, outs, ins = product.shape
            joined = factor.dense().reshape(-1, bond) @ product.reshape(bond, -1)
            product = joined.reshape(-1, o, i, outs, ins).transpose(0, 1, 3, 2, 4).reshape(-1, o * outs, i * ins)
        return np.ascontiguousarray(product[0])


Weight = Dense | Quantized | Factored


def stored_parts(module: str, weight: Weight) -> list[tuple[str, Dense | Quantized]]:
    """A matrix by its module, or the factors of one by the names that they are stored under."""
    if isinstance(weight, Factored):
        return [(f"{module}.factors.{index}", factor) for index, factor in enumerate(weight.factors)]
    return [(module, weight)]


def owner_of(part: str) -> str:
    """The module that a part of `stored_parts` belongs to."""
    return part.partition(".factors.")[0]


def of_parts(weight: Weight, parts: Sequence[Dense | Quantized]) -> Weight:
    """The matrix with other `stored_parts` in place of its own."""
    return Factored(tuple(parts), weight.sites) if isinstance(weight, Factored) else parts[0]


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
    minima: list[NDArray[Any]] = [part.minima for part in parts if part.minima is not None]
    steps = [part.steps for part in parts if part.steps is not None]
    return replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate(zeros) if zeros else None,
        minima=np.concatenate(minima) if minima else None,
        steps=np.concatenate(steps) if steps else None,
    )


def _layout(weight: Quantized) -> tuple[object, ...]:
    parts = (weight.zeros, weight.minima, weight.steps)
    return weight.bits, weight.block, weight.columns, *(part is None for part in parts)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes (..., n) of `bits` bits along the last axis: (..., ceil(n * bits / 8)) bytes, unused bits zero."""
    if bits == 8:
        return codes
    size = -(-codes.shape[-1] * bits // 8)
    if missing := -codes.shape[-1] % EIGHT:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], axis=-1)
    if bits == 4:
        halves: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
        return halves[..., :size]
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // EIGHT), "<u8")  # eight codes are `bits` bytes
    for index in range(EIGHT):
        words |= codes[..., index::EIGHT].astype(np.uint64) << np.uint64(bits * index)
    stream = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(stream.reshape(*codes.shape[:-1], -1)[..., :size])


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Undo `pack`: (..., n) bytes to (..., floor(n * 8 / bits)) codes."""
    if bits == 8:
        return packed
    count = packed.shape[-1] * 8 // bits
    if bits == 4:
        codes = np.empty((*packed.shape[:-1], count), np.uint8)
        codes[..., 0::2] = packed & 15
        codes[..., 1::2] = packed >> 4
        return codes
    if missing := -packed.shape[-1] % bits:
        packed = np.concatenate([packed, np.zeros((*packed.shape[:-1], missing), np.uint8)], axis=-1)
    stream = packed.reshape(*packed.shape[:-1], -1, bits)
    bytes_of_words = np.zeros((*stream.shape[:-1], EIGHT), np.uint8)
    bytes_of_words[..., :bits] = stream
    words = bytes_of_words.view("<u8")[..., 0]
    mask = np.uint64((1 << bits) - 1)
    codes = np.empty((*words.shape, EIGHT), np.uint8)
    for index in range(EIGHT):
        codes[..., index] = (words >> np.uint64(bits * index)) & mask
    return np.ascontiguousarray(codes.reshape(*packed.shape[:-1], -1)[..., :count])
