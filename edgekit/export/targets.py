"""What differs between the places a bundle can run on: one literal table."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from edgekit.device import Device
from edgekit.errors import UserError
from edgekit.schema import nearest

ActivationBits = Literal[8, 15, "mixed"]
ACTIVATIONS: dict[str, ActivationBits] = {"8": 8, "15": 15, "mixed": "mixed"}
TargetName = Literal["portable", "x86", "arm", "npu-qnn", "npu-openvino"]


@dataclass(frozen=True)
class Target:
    """Where a bundle runs.

    `native`: through our own operators, where the model is quantised and their kernels are at hand. `integer_bits`:
    the widths of quantised matrices that stock operators multiply in integers, several times faster where the
    processor has 8-bit dot products, at a small loss that the parity check measures. 8-bit matrices always do: in
    float32 onnxruntime unpacks them anew for every token. `provider` is set where an accelerator runs graphs of
    fixed shapes.
    """

    name: TargetName
    arch: str
    device: str
    native: bool
    integer_bits: tuple[int, ...]
    provider: Literal["", "qnn", "openvino"] = ""


TARGETS: dict[str, Target] = {
    "portable": Target("portable", "any", "", native=False, integer_bits=(8,)),
    "x86": Target("x86", "x86_64", "generic-x86", native=True, integer_bits=(4, 8)),
    "arm": Target("arm", "aarch64", "pi5", native=True, integer_bits=(4, 8)),
    "npu-qnn": Target("npu-qnn", "any", "", native=False, integer_bits=(), provider="qnn"),
    "npu-openvino": Target("npu-openvino", "any", "", native=False, integer_bits=(), provider="openvino"),
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
