"""Accelerators: execution providers that come as packages of their own, found through onnxruntime's plugin interface.

A provider's library is registered once a process; `get_ep_devices` then lists what it can compute on. `choose` takes
one for a bundle and says what was taken and why: a missing package, driver or NPU is a reason, never a silent change.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnxruntime as ort

from edgekit.errors import DeviceError, UserError

Processor = Literal["auto", "npu", "cpu"]


@dataclass(frozen=True)
class Provider:
    """A provider's package and module on PyPI, the vendor that onnxruntime names, and what its NPU is called."""

    package: str
    module: str
    vendor: str
    npu: str


PROVIDERS: dict[str, Provider] = {
    "qnn": Provider("onnxruntime-qnn", "onnxruntime_qnn", "Qualcomm", "a Hexagon NPU"),
    "openvino": Provider("onnxruntime-ep-openvino", "onnxruntime_ep_openvino", "Intel", "an Intel NPU"),
}

# Left alone, OpenVINO's CPU device rounds activations to 8 bits, and to bfloat16 where the processor has that: logits
# of a random model then differ by 2 to 3 % from the graph's, and by 1e-6 so.
EXACT = (("load_config", '{"CPU":{"EXECUTION_MODE_HINT":"ACCURACY"}}'),)


@dataclass(frozen=True)
class Choice:
    """What a bundle's graphs run on: plugin devices with their options, or none for onnxruntime's own CPU code.

    `name` says it for reports: "openvino CPU". `reason` is there where it is not what the bundle is made for.
    """

    name: str
    devices: Sequence[Any] = ()
    options: tuple[tuple[str, str], ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name

    def apply(self, options: ort.SessionOptions) -> None:
        """Make a session use it."""
        if self.devices:
            options.add_provider_for_devices(list(self.devices), dict(self.options))


@functools.cache
def plugin_devices(name: str) -> tuple[Any, ...]:
    """The devices that a provider offers here. Raises DeviceError: it is not installed, or does not load."""
    provider = PROVIDERS[name]
    try:
        module = importlib.import_module(provider.module)
    except ImportError as problem:
        raise DeviceError(f"{name} needs the package {provider.package}: pip install 'edgekit[npu]'") from problem
    try:
        ort.register_execution_provider_library(module.get_ep_names()[0], module.get_library_path())
    except Exception as problem:  # onnxruntime raises classes of its own, with no common base
        text = str(problem).strip().splitlines()
        raise DeviceError(f"{provider.package} must load: {text[0][:300] if text else problem!r}") from problem
    return tuple(device for device in ort.get_ep_devices() if device.ep_vendor == provider.vendor)


def choose(name: str, processor: Processor = "auto") -> Choice:
    """What to run a bundle for provider `name` on.

    "npu" insists on one, "cpu" on none; "auto" takes an NPU where there is one and says why else it did not.
    Qualcomm's package computes on any x86-64 machine as a Hexagon NPU would, slowly: "npu" takes that, "auto" does not.
    Raises DeviceError: an NPU was asked for and there is none.
    """
    if processor not in ("auto", "npu", "cpu"):
        raise UserError(f"the processor must be auto, npu or cpu: got {processor!r}")
    if name == "qnn":
        return _qnn(processor)
    return _openvino(processor)


def _qnn(processor: Processor) -> Choice:
    plain = "onnxruntime CPU"
    if processor == "cpu":
        return Choice(plain)
    try:
        devices = plugin_devices("qnn")
    except DeviceError as problem:
        if processor == "npu":
            raise
        return Choice(plain, reason=str(problem))
    emulated = platform.machine() in ("x86_64", "AMD64")
    if emulated and processor == "auto":
        return Choice(plain, reason="no Hexagon NPU in an x86-64 machine")
    if not devices:
        reason = "onnxruntime-qnn found no Hexagon NPU: is its driver there (/dev/fastrpc-cdsp)?"
        if processor == "npu":
            raise DeviceError(reason)
        return Choice(plain, reason=reason)
    module = importlib.import_module(PROVIDERS["qnn"].module)
    options = (("backend_path", str(module.get_qnn_htp_path())), ("htp_performance_mode", "burst"))
    return Choice("qnn NPU, emulated" if emulated else "qnn NPU", devices[:1], options)


def _openvino(processor: Processor) -> Choice:
    try:
        devices = plugin_devices("openvino")
    except DeviceError as problem:
        if processor == "npu":
            raise
        return Choice("onnxruntime CPU", reason=str(problem))
    kinds = {device.ep_metadata.get("ov_device"): device for device in devices if _alone(device)}
    if processor != "cpu" and "NPU" in kinds:
        return Choice("openvino NPU", [kinds["NPU"]])
    reason = "" if processor == "cpu" else "OpenVINO found no NPU: is its driver there (/dev/accel/accel0)?"
    if processor == "npu":
        raise DeviceError(f"{reason} It has {', '.join(sorted(map(str, kinds))) or 'nothing'}")
    if "CPU" not in kinds:
        return Choice("onnxruntime CPU", reason="OpenVINO offers no CPU device here")
    return Choice("openvino CPU", [kinds["CPU"]], EXACT, reason)


def _alone(device: Any) -> bool:
    """Whether it is a device itself and not one of OpenVINO's that choose among others (AUTO, HETERO)."""
    return "ov_meta_device" not in device.ep_metadata


def provider_version(name: str) -> str | None:
    """The installed version of a provider's package; None without it."""
    try:
        return importlib.metadata.version(PROVIDERS[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None
