"""Measurements and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["measured", "estimated", "predicted"]


@dataclass(frozen=True)
class Measurement:
    """One number that says where it comes from.

    `value` is None when it could not be had, and `note` then says why. `n` counts the repetitions or items behind it;
    `spread` is the half-width of its 95% interval, in `unit`, where it has one.
    """

    name: str
    value: float | None
    unit: str
    how: How = "measured"
    n: int = 1
    spread: float | None = None
    note: str = ""
