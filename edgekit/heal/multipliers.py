"""Learnable multipliers: a scale for each row and column of a matrix, trained beside it and folded away afterwards.

    W_eff[i, j] = r_i W[i, j] c_j          or  s W  with one scalar for the matrix

Row multipliers r (one an output), column multipliers c (one an input), all one at the start. They see gradients
averaged over a whole row or column, so they correct a matrix's scale where truncation or rounding shifted it, with few
numbers. Their weight decay is small (2e-3, against drift along symmetries such as q's scale against k's), and
they take no part in the norm that gradients are clipped by: with them in it everything is clipped.

Which matrices have which, from the paper:

    placement "minimal"    o, down, embedding: row and column    q, gate: row    k, v, up, head: none
    placement "full"       all matrices: row and column, but the head none

The norms' gains are trained anyhow: they are the column multipliers of the matrices that read them.
Folding is exact up to one float32 rounding a weight: W <- r W c. Where a matrix's codes are fixed, r goes into the
float16 scales (and minima) of its blocks; training then already sees the rounded products, so that folding changes
nothing. A column multiplier has no place there, and is refused.
Source: Velikanov et al., arXiv 2601.04890, sections 3 and 4. We leave out its log-scale form, which gains nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from edgekit.errors import UserError

Placement = Literal["none", "scalar", "minimal", "full"]
Sides = tuple[bool, bool]  # rows, columns

WEIGHT_DECAY = 2e-3
PLACEMENT: dict[str, dict[str, Sides]] = {
    "minimal": {
        "q": (True, False),
        "k": (False, False),
        "v": (False, False),
        "o": (True, True),
        "gate": (True, False),
        "up": (False, False),
        "down": (True, True),
        "embedding": (True, True),
        "head": (False, False),
    },
    "full": {
        **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down", "embedding"), (True, True)),
        "head": (False, False),
    },
}


class Multipliers(nn.Module):  # type: ignore[misc]
    """The multipliers of one matrix of `shape` (out, in); those it does not have are None."""

    def __init__(self, shape: tuple[int, int], *, rows: bool = False, columns: bool = False, scalar: bool = False):
        super().__init__()
        self.row = nn.Parameter(torch.ones(shape[0])) if rows else None
        self.column = nn.Parameter(torch.ones(shape[1])) if columns else None
        self.scalar = nn.Parameter(torch.ones(1)) if scalar else None

    def forward(self, W: Tensor) -> Tensor:
        """W_eff of the module's text."""
        if self.row is not None:
            W = W * self.row[:, None]
        if self.column is not None:
            W = W * self.column
        return W if self.scalar is None else W * self.scalar

    def on_scales(self, scales: Tensor) -> Tensor:
        """What rows (and the scalar) make of scales or minima, (out, blocks)."""
        assert self.column is None, "columns have no place in a block's scale"
        if self.row is not None:
            scales = scales * self.row[:, None]
        return scales if self.scalar is None else scales * self.scalar


def multipliers_for(
    role: str, shape: tuple[int, int], placement: Placement, *, fixed_codes: bool = False
) -> Multipliers | None:
    """The multipliers of the matrix with this role (a key of PLACEMENT's tables), or None where it has none.

    With `fixed_codes` only what folds into scales is placed: rows and scalars. Raises UserError for another placement.
    """
    if placement == "none":
        return None
    if placement == "scalar":
        return None if role == "head" else Multipliers(shape, scalar=True)
    if placement not in PLACEMENT:
        raise UserError(f"multipliers must be none, scalar, minimal or full: got {placement!r}")
    rows, columns = PLACEMENT[placement][role]
    columns = columns and not fixed_codes
    return Multipliers(shape, rows=rows, columns=columns) if rows or columns else None
