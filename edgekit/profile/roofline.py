"""What bounds decoding: memory bandwidth, arithmetic, or what runs around the kernels.

A token reads every weight once and the keys and values so far: t_memory = bytes / measured read bandwidth. It
multiplies every weight once, as each token of a prompt does, whose weights are read once for many tokens: t_compute = 1
/ prefill rate. What onnxruntime and Python need between the kernels is t_overhead, measured. Predicted is 1 /
(max(t_memory, t_compute) + t_overhead), the ceiling 1 / t_memory, and the verdict names the largest of the three, or
none when it explains less than half of the time: another program may have taken the rest.

Prefill's rate is a lower bound of what the arithmetic can do, and decoding may use a finer (slower) arithmetic than
prefill, so t_compute is a rough figure. Weights that fit into the processor's caches are read faster than from memory.
Source: S. Williams, A. Waterman and D. Patterson, Roofline: an insightful visual performance model, CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UserError

Bound = Literal["bandwidth bound", "compute bound", "overhead bound", "none of them"]

_LEAST_SHARE = 0.5  # of a token's time that one cause must explain


@dataclass(frozen=True)
class Roofline:
    """Seconds a token by cause, tokens a second measured and predicted, and the verdict."""

    memory_s: float
    compute_s: float
    overhead_s: float
    measured_rate: float
    bytes_per_token: float
    bandwidth_gbs: float

    @property
    def ceiling(self) -> float:
        """Tokens a second if nothing but reading took time."""
        return 1 / self.memory_s

    @property
    def predicted(self) -> float:
        """Tokens a second with arithmetic overlapping the reading, and overhead after it."""
        return 1 / (max(self.memory_s, self.compute_s) + self.overhead_s)

    @property
    def achieved_gbs(self) -> float:
        """Gigabytes a second that decoding read."""
        return self.bytes_per_token * self.measured_rate / 1e9

    @property
    def verdict(self) -> Bound:
        parts: dict[Bound, float] = {
            "bandwidth bound": self.memory_s, "compute bound": self.compute_s, "overhead bound": self.overhead_s,
        }  # fmt: skip
        largest = max(parts, key=lambda name: parts[name])
        return largest if parts[largest] >= _LEAST_SHARE / self.measured_rate else "none of them"

    @property
    def reason(self) -> str:
        """The verdict with the numbers behind it."""
        return (
            f"{self.verdict}: of {1e3 / self.measured_rate:.2f} ms a token, reading needs {1e3 * self.memory_s:.2f},"
            f" arithmetic {1e3 * self.compute_s:.2f}, what is around the kernels {1e3 * self.overhead_s:.2f}"
        )


def roofline(
    *,
    bytes_per_token: float,
    bandwidth_gbs: float,
    prefill_rate: float,
    decode_rate: float,
    overhead_s: float,
) -> Roofline:
    """Put the measured figures together. `prefill_rate` and `decode_rate` are tokens a second, of the same weights.

    Raises UserError: a figure that must be above zero is not.
    """
    figures = {"bytes a token": bytes_per_token, "bandwidth": bandwidth_gbs, "prefill": prefill_rate,
               "decode": decode_rate}  # fmt: skip
    for name, number in figures.items():
        if not number > 0:
            raise UserError(f"a roofline needs {name} above zero: got {number}")
    return Roofline(
        memory_s=bytes_per_token / (bandwidth_gbs * 1e9),
        compute_s=1 / prefill_rate,  # the same multiply-adds a token
        overhead_s=max(0.0, overhead_s),
        measured_rate=decode_rate,
        bytes_per_token=bytes_per_token,
        bandwidth_gbs=bandwidth_gbs,
    )
