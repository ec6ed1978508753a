"""Training through a quantiser: the forward pass sees rounded weights, the gradient passes to the float ones below.

A row is cut into blocks of `block` columns. Each block has a scale s and an offset, both learned, and b bits a code:

    zero       q = clip(round(w / s) + z, 0, 2**b - 1)      w^ = s (q - z)     z a whole number from 0 to 2**b - 1
    minimum    q = clip(round((w - m) / s), 0, 2**b - 1)    w^ = s q + m       m a float16 number
    none       as zero with z = 2**(b - 1), which is not learned: the symmetric grid

These are the grids of `edgekit.quant.grid`. Rounding has gradient one ("straight through"), clipping its own, whence

    inside the range    dw^/dw = 1    dw^/ds = (q - z) - w/s  or  q - (w - m)/s    dw^/dz = dw^/dm = 0
    outside it          dw^/dw = 0    dw^/ds = q - z          or  q                dw^/dz = -s,  dw^/dm = 1

The scale is learned as a factor of its first value, the minimum as steps of the first scale, so that one learning rate
suits all blocks. In the forward pass scales and minima are what is stored, float16 or 8-bit codes of a row's fixed
step: `to_weight` gives exactly the integers and scales that the last forward pass used.
Source: Esser et al., LSQ, arXiv 1902.08153, equations 1 to 3; Bhalgat et al., LSQ+, arXiv 2004.09576, for offsets.
We leave out LSQ's gradient scale: AdamW, whose steps do not depend on a gradient's scale, trains these parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import ModelError, UserError
from edgekit.weight import BITS, Quantized, pack, unpack

Offset = Literal["zero", "minimum", "none"]
Scales = Literal["float16", "int8"]
HEADROOM = 1.25  # of a row's 8-bit scales at first, for those that grow
SMALLEST_FACTOR = 0.02  # of its first value, below which no scale falls
SHRINK = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)  # of a block's whole range, tried for its first scale


@dataclass(frozen=True)
class Levels:
    """The grid of one matrix: `bits` a code, `block` columns a scale, a block's offset, how scales are stored."""

    bits: int
    block: int
    offset: Offset
    scales: Scales = "float16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"bits must be one of {', '.join(map(str, BITS))}: got {self.bits}")
        if self.block not in (16, 32, 64, 128):
            raise UserError(f"block must be 16, 32, 64 or 128: got {self.block}")
        if self.offset not in get_args(Offset):
            raise UserError(f"offset must be one of {', '.join(get_args(Offset))}: got {self.offset!r}")
        if self.scales not in get_args(Scales):
            raise UserError(f"scales must be one of {', '.join(get_args(Scales))}: got {self.scales!r}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


class FakeQuant(nn.Module):  # type: ignore[misc]
    """The learned grid of one matrix: called with float weights (out, in), gives the rounded ones.

    `scale` and `offset`: (out, blocks) float32, the values at the start; offset is z, m, or ignored. `steps`: (out, 1)
    or (out, 2) where scales and minima are 8-bit multiples of a row's steps, which stay as they are.
    """

    def __init__(self, levels: Levels, scale: Tensor, offset: Tensor, steps: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("steps", steps)
        self.levels = levels
        self.compute: Callable[..., Tensor] = fake_quantise
        self.register_buffer("scale0", scale)
        self.factor = nn.Parameter(torch.ones_like(scale))
        if levels.offset == "zero":
            self.offset = nn.Parameter(offset.clone())
        elif levels.offset == "minimum":
            self.register_buffer("minimum0", offset)
            self.offset = nn.Parameter(torch.zeros_like(offset))

    @classmethod
    def fit(cls, W: Tensor, levels: Levels) -> FakeQuant:
        """The grid for float weights W: (out, in), each block's range shrunk for the least squared error."""
        with torch.no_grad():
            scale, offset = _fit(_blocks(W.float(), levels.block), levels)
            if levels.scales == "float16":
                return cls(levels, scale, offset)
            return cls(levels, *_with_steps(scale, offset, levels))

    @classmethod
    def of(cls, weight: Quantized) -> FakeQuant:
        """The grid that a quantised matrix lies on; its dense values are kept exactly."""
        scale = torch.from_numpy(np.array(weight.block_scales(), np.float32))
        blocks, minima = scale.shape[1], weight.block_minima()
        if minima is not None:
            kind: Offset = "minimum"
            offset = torch.from_numpy(np.array(minima, np.float32))
        elif weight.zeros is not None:
            kind = "zero"
            offset = torch.from_numpy(unpack(weight.zeros, weight.bits)[:, :blocks].astype(np.float32))
        else:
            kind, offset = "none", torch.zeros_like(scale)
        steps = None if weight.steps is None else torch.from_numpy(weight.steps.astype(np.float32))
        stored: Scales = "float16" if steps is None else "int8"
        return cls(Levels(weight.bits, weight.block, kind, stored), scale, offset, steps)

    def forward(self, W: Tensor) -> Tensor:
        """The weights that the codes stand for: W as it is rounded, (out, in)."""
        return self.compute(W, *self._parts(), self.levels)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and offset (z or m) as they are stored, (out, blocks) each."""
        return grid_of(*self._parts(), self.levels)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """First scales, their factors, offsets, first minima (or, where a grid lacks one, its scales again), steps."""
        kind = self.levels.offset
        offset = self.scale0 if kind == "none" else self.offset
        return self.scale0, self.factor, offset, self.minimum0 if kind == "minimum" else self.scale0, self.steps

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def integers(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, blocks, block) uint8 of W, scales and offsets (out, blocks), as the forward pass has them.

        Raises ModelError for NaN or infinite weights or scales.
        """
        s, offset = self.grid()
        x = _blocks(W.float(), self.levels.block)
        if not bool(torch.isfinite(x).all() & torch.isfinite(s).all() & torch.isfinite(offset).all()):
            raise ModelError("trained weights must be finite: a matrix has NaN or infinity; take an earlier state")
        return _codes(x, s[..., None], offset[..., None], self.levels).to(torch.uint8), s, offset

    def _steps(self, column: int) -> Tensor:
        """A row's step of scales (0) or minima (1), with 1 in the place of 0."""
        step: Tensor = self.steps[:, column : column + 1]
        return torch.where(step == 0, torch.ones_like(step), step)

    def to_weight(self, W: Tensor) -> Quantized:
        """The matrix as it is stored. Raises ModelError as `integers` does."""
        codes, s, offset = self.integers(W)
        bits, kind = self.levels.bits, self.levels.offset
        zeros = pack(offset.cpu().numpy().astype(np.uint8), bits) if kind == "zero" else None
        stored: list[Any] = [s, offset] if kind == "minimum" else [s]
        if self.steps is None:
            stored = [part.cpu().numpy().astype(np.float16) for part in stored]
        else:  # a step of 0 belongs to a row of zeros
            whole = [torch.round(part / self._steps(i)).cpu().numpy() for i, part in enumerate(stored)]
            stored = [part.astype(kind) for part, kind in zip(whole, (np.uint8, np.int8), strict=False)]
        return Quantized(
            codes=pack(codes.cpu().numpy(), bits),
            scales=stored[0],
            zeros=zeros,
            minima=stored[1] if kind == "minimum" else None,
            steps=None if self.steps is None else self.steps.cpu().numpy().astype(np.float16),
            bits=bits,
            block=self.levels.block,
            columns=W.shape[1],
        )


def grid_of(
    scale: Tensor, factor: Tensor, offset: Tensor, minimum: Tensor, steps: Tensor | None, levels: Levels
) -> tuple[Tensor, Tensor]:
    """The scale and offset that the parameters stand for, with straight-through gradients; all (out, blocks)."""
    s = _stored(scale * factor.clamp_min(SMALLEST_FACTOR), steps, 0, (0, 255))
    if levels.offset == "zero":
        return s, _Round.apply(offset.clamp(0, levels.top))
    if levels.offset == "minimum":
        return s, _stored(minimum + scale * offset, steps, 1, (-128, 127))
    return s, torch.full_like(s, float(1 << (levels.bits - 1)))


def _stored(values: Tensor, steps: Tensor | None, column: int, codes: tuple[int, int]) -> Tensor:
    """Scales or minima as they are read again: float16, or codes of 8 bits times the row's step."""
    if steps is None:
        return as_half(values)
    step = steps[:, column : column + 1]
    divisor = torch.where(step == 0, torch.ones_like(step), step)
    return _Round.apply(values / divisor).clamp(*codes) * step


def fake_quantise(
    W: Tensor,
    scale: Tensor,
    factor: Tensor,
    offset: Tensor,
    minimum: Tensor,
    steps: Tensor | None,
    levels: Levels,
) -> Tensor:
    """w^ of the module's text for W: (out, in), on the grid of these parameters (`grid_of`)."""
    s, o = grid_of(scale, factor, offset, minimum, steps, levels)
    s, o = s[..., None], o[..., None]
    q = _codes(_blocks(W, levels.block), s, o, levels)
    rounded = q * s + o if levels.offset == "minimum" else (q - o) * s
    return rounded.reshape(W.shape[0], -1)[:, : W.shape[1]]


def _codes(x: Tensor, s: Tensor, offset: Tensor, levels: Levels) -> Tensor:
    """Codes as floats, x: (out, blocks, block), s and offset: (out, blocks, 1); a scale of 0 gives the code of 0."""
    divisor = torch.where(s == 0, torch.ones_like(s), s)
    if levels.offset == "minimum":
        return _Round.apply((x - offset) / divisor).clamp(0, levels.top)
    return (_Round.apply(x / divisor) + offset).clamp(0, levels.top)


class _Round(torch.autograd.Function):  # type: ignore[misc]
    """round() with gradient one. A custom function, since x + (round(x) - x) is not always a whole number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Half(torch.autograd.Function):  # type: ignore[misc]
    """The nearest float16 number, with gradient one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def as_half(values: Tensor) -> Tensor:
    """The nearest float16 numbers, with straight-through gradients."""
    half: Tensor = _Half.apply(values)
    return half


def _blocks(W: Tensor, block: int) -> Tensor:
    """(out, in) as (out, blocks, block), padded with zeros."""
    missing = -W.shape[1] % block
    if missing:
        W = nn.functional.pad(W, (0, missing))
    return W.reshape(W.shape[0], -1, block)


def _fit(x: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """The scale and offset of each block with the least squared error among a few shrunken ranges."""
    lo, hi = x.amin(-1), x.amax(-1)
    best = torch.full_like(lo, torch.inf)
    scale, offset = torch.zeros_like(lo), torch.zeros_like(lo)
    for shrink in SHRINK:
        s, o = _range_to_grid(shrink * lo, shrink * hi, levels)
        wide_s, wide_o = s[..., None], o[..., None]
        q = _codes(x, wide_s, wide_o, levels)
        rounded = q * wide_s + wide_o if levels.offset == "minimum" else (q - wide_o) * wide_s
        error = (x - rounded).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset


def _with_steps(scale: Tensor, offset: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (and minima) as 8-bit multiples of a row's steps, which leave room to grow; and the steps."""
    step = (HEADROOM * scale.abs().amax(1, keepdim=True) / 255).half().float()
    scale = _stored(scale.abs(), step, 0, (0, 255))
    if levels.offset != "minimum":
        return scale, offset, step
    steps = torch.cat([step, (HEADROOM * offset.abs().amax(1, keepdim=True) / 127).half().float()], 1)
    return scale, _stored(offset, steps, 1, (-128, 127)), steps


def _range_to_grid(lo: Tensor, hi: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Scale and offset that span lo to hi: (out, blocks)."""
    if levels.offset == "minimum":
        return ((hi - lo) / levels.top).half().float(), lo.half().float()
    if levels.offset == "none":  # the larger side gets the code 0, so the scale may be negative
        half = 1 << (levels.bits - 1)
        s = torch.where(-lo >= hi, lo, hi) / -half
        return s.half().float(), torch.full_like(lo, half)
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    s = ((hi - lo) / levels.top).half().float()
    return s, torch.round(-lo / torch.where(s == 0, torch.ones_like(s), s)).clamp(0, levels.top)
