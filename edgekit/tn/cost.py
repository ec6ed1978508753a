"""When do factors pay? What one token's product costs on a device, from the bytes it reads and the nodes it runs.

    seconds = numbers * bits / 8 / bandwidth + nodes * NODE_SECONDS

A token's products are bound by memory, so fewer numbers are fewer seconds, but each node of the graph has its own
price: the executor calls it, threads are woken and wait for each other. On a fast machine a small matrix is read in
less time than that, and a product of two is slower than the matrix. A prompt's products are bound by multiplications
instead, so factors pay only when they save those too.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from edgekit.device import Device
from edgekit.weight import Dense, Factored, Quantized

NODE_SECONDS = 5e-6  # of one more product, on two threads of a PC (docs/structure.md)
UNKNOWN_GBS = 50.0  # where a device's bandwidth is not known: a fast PC's, on which factors pay least


@dataclass(frozen=True)
class Cost:
    """Of the products of one token: numbers read, multiplications, nodes of the graph, and predicted seconds."""

    numbers: int
    multiplications: int
    nodes: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def with_nodes(self, more: int) -> Cost:
        """The same with `more` nodes, which may be below 0."""
        return replace(self, nodes=self.nodes + more, seconds=self.seconds + more * NODE_SECONDS)

    def pays_against(self, other: Cost, *, slack: float = 1.0) -> bool:
        """Whether this is no slower than `other`, for a token and for a prompt; within `slack` for the token."""
        return self.seconds <= slack * other.seconds and self.multiplications <= other.multiplications


def bandwidth_gbs(device: Device | None) -> float:
    """Bytes a nanosecond that a device's products read."""
    if device is None:
        return UNKNOWN_GBS
    measured = device.read_gbs(device.threads or 1)
    return device.bandwidth_decode_gbs or measured or device.bandwidth_peak_gbs or UNKNOWN_GBS


def cost_of_dense(shape: tuple[int, int], *, bits: float, device: Device | None) -> Cost:
    """A matrix (out, in) at `bits` bits a number, scales counted."""
    numbers = shape[0] * shape[1]
    return Cost(numbers, numbers, 1, _seconds(numbers * bits / 8, 1, device))


def cost_of_rank(shape: tuple[int, int], rank: int, *, bits: float, device: Device | None) -> Cost:
    """Its two factors of this rank; the matrix itself for rank 0."""
    if not rank:
        return cost_of_dense(shape, bits=bits, device=device)
    numbers = rank * sum(shape)
    return Cost(numbers, numbers, 2, _seconds(numbers * bits / 8, 2, device))


def cost_of(weight: Dense | Quantized | Factored, device: Device | None) -> Cost:
    """A matrix as it is stored. Between the sites of a longer product its axes are turned, which is one more node."""
    if not isinstance(weight, Factored):
        return cost_of_dense(
            weight.shape, bits=8 * weight.size_bytes / (weight.shape[0] * weight.shape[1]), device=device
        )
    numbers = sum(factor.shape[0] * factor.shape[1] for factor in weight.factors)
    nodes = len(weight.factors) if weight.is_low_rank else 2 * len(weight.factors) + 1
    return Cost(numbers, weight.multiplications, nodes, _seconds(weight.size_bytes, nodes, device))


def _seconds(size_bytes: float, nodes: int, device: Device | None) -> float:
    return size_bytes / (bandwidth_gbs(device) * 1e9) + nodes * NODE_SECONDS
