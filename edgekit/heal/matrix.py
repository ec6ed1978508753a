"""A trainable matrix: float values, and what may lie on top of them, in the order of the forward pass.

    values          the weights themselves, or fixed codes
    + adapter       B A of a low rank, where only adapters are trained (Hu et al., LoRA, arXiv 2106.09685)
    * multipliers   of rows and columns (`edgekit.heal.multipliers`)
    -> fake quant   onto the grid that the matrix is stored on (`edgekit.heal.fake_quant`)

`weight()` is what the model computes with; `fold()` is what is written, and both are the same matrix.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import UserError
from edgekit.heal.fake_quant import FakeQuant, Levels, as_half
from edgekit.heal.multipliers import Multipliers
from edgekit.weight import Dense, Factored, Quantized, Weight, unpack


class Matrix(nn.Module):  # type: ignore[misc]
    """A float matrix (out, in), with a grid when it is to be stored as codes."""

    def __init__(self, values: Tensor, *, quantiser: FakeQuant | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.quantiser = quantiser
        self.multipliers: Multipliers | None = None
        self.adapter: Adapter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def latent(self) -> Tensor:
        """The float weights before rounding."""
        W = self.values if self.adapter is None else self.values + self.adapter()
        return W if self.multipliers is None else self.multipliers(W)

    def weight(self) -> Tensor:
        """The weights to compute with, (out, in)."""
        W = self.latent()
        return W if self.quantiser is None else self.quantiser(W)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def fold(self) -> Weight:
        """The weights to write: everything on top folded in. Raises ModelError for NaN or infinity in a grid."""
        W = self.latent()
        if self.quantiser is not None:
            return self.quantiser.to_weight(W)
        return Dense(np.ascontiguousarray(W.float().cpu().numpy()))


class FixedCodes(nn.Module):  # type: ignore[misc]
    """A matrix whose codes stay as they are; only multipliers of its rows, folded into the scales, are trained."""

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.stored = weight
        blocks = weight.scales.shape[1]
        codes = torch.from_numpy(unpack(weight.codes, weight.bits)).reshape(weight.shape[0], blocks, weight.block)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", torch.from_numpy(np.array(weight.block_scales(), np.float32)), persistent=False)
        zeros = torch.full_like(self.scales, float(1 << (weight.bits - 1)))
        if weight.zeros is not None:
            zeros = torch.from_numpy(unpack(weight.zeros, weight.bits)[:, :blocks].astype(np.float32))
        stored = weight.block_minima()
        minima = None if stored is None else torch.from_numpy(np.array(stored, np.float32))
        self.register_buffer("zeros", zeros if minima is None else torch.zeros_like(zeros), persistent=False)
        self.register_buffer("minima", minima, persistent=False)
        self.multipliers: Multipliers | None = None
        self.adapter: Adapter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    def weight(self) -> Tensor:
        """The weights to compute with, (out, in)."""
        W = (self.codes.float() - self.zeros[..., None]) * self._scaled(self.scales)[..., None]
        if self.minima is not None:
            W = W + self._scaled(self.minima)[..., None]
        return W.reshape(self.shape[0], -1)[:, : self.shape[1]]

    def _scaled(self, scales: Tensor) -> Tensor:
        """Scales or minima with the multipliers in them, as float16 keeps them."""
        if self.multipliers is None:
            return scales
        return as_half(self.multipliers.on_scales(scales))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def fold(self) -> Weight:
        """The matrix with the multipliers in its scales; the codes are those that it had."""
        scales = self._scaled(self.scales).cpu().numpy().astype(np.float16)
        minima = None if self.minima is None else self._scaled(self.minima).cpu().numpy().astype(np.float16)
        return replace(self.stored, scales=scales, minima=minima)


class Adapter(nn.Module):  # type: ignore[misc]
    """A low-rank change B A of a matrix (out, in): A random, B zero, so that it begins as nothing."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, *shape)
        self.A = nn.Parameter(torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self) -> Tensor:
        return self.B @ self.A


AnyMatrix = Matrix | FixedCodes


def plain_scales(weight: Quantized) -> Quantized:
    """The matrix with float16 scales and minima, to put multipliers in: the nearest ones where it has 8-bit scales."""
    if weight.steps is None:
        return weight
    minima = weight.block_minima()
    return replace(
        weight,
        scales=weight.block_scales().astype(np.float16),
        minima=None if minima is None else minima.astype(np.float16),
        steps=None,
    )


def trainable_matrix(
    weight: Weight, *, levels: Levels | None, fixed: bool = False, device: torch.device | None = None
) -> AnyMatrix:
    """The matrix for a stored weight. A quantised one is trained on its own grid, or with its codes `fixed`.

    A float one is trained as it is, or on a grid of these `levels`. Raises UserError: factors, which would be lost.
    """
    if isinstance(weight, Factored):
        raise UserError("healing trains whole matrices, not factors: heal first, and decompose afterwards")
    if isinstance(weight, Quantized):
        if fixed:
            codes: FixedCodes = FixedCodes(plain_scales(weight)).to(device)
            return codes
        matrix: Matrix = Matrix(torch.from_numpy(weight.dense()), quantiser=FakeQuant.of(weight)).to(device)
        return matrix
    values = torch.from_numpy(np.array(weight.dense(), np.float32)).to(device)
    return Matrix(values, quantiser=None if levels is None else FakeQuant.fit(values, levels))
