"""What differs between the places a bundle can run on: one literal table."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from edgekit.device import Device
from edgekit.errors import UserError
from edgekit.schema import nearest

TargetName = Literal["portable", "x86", "arm"]


@dataclass(frozen=True)
class Target:
    """`int8_activations`: quantised matrices multiply in integers, which is several times faster where the processor
    has 8-bit dot products, at a small loss that the parity check measures. `portable` multiplies in float32."""

    name: TargetName
    arch: str
    device: str
    int8_activations: bool


TARGETS: dict[str, Target] = {
    "portable": Target("portable", "any", "", int8_activations=False),
    "x86": Target("x86", "x86_64", "generic-x86", int8_activations=True),
    "arm": Target("arm", "aarch64", "pi5", int8_activations=True),
}


def find_target(name: str) -> Target:
    """A target by name. Raises UserError naming the nearest known one."""
    if name not in TARGETS:
        raise UserError(f"the target must be one of {', '.join(TARGETS)}: got {name!r}{nearest(name, TARGETS)}")
    return TARGETS[name]


def host_target() -> str:
    """The name of the target for this machine."""
    machine = platform.machine()
    return {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}.get(machine, "portable")


def target_for(device: Device) -> Target:
    """The target that suits a device, by its architecture."""
    return next(target for target in TARGETS.values() if target.arch == device.arch)
