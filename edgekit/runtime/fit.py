"""Will a model fit on a device, and how fast will it decode there? Predicted; nothing is loaded and nothing runs.

    memory  = runtime + weights + cache(context) + activations        against   RAM - system
    tokens/s = bandwidth / (bytes of weights read per token + bytes of cache read per token)

Decoding on a small processor waits for memory (facts of the roofline: `edgekit.profile.roofline`), so bytes over
bandwidth predict it. The bandwidth is the one that explains published decode speeds on the device, else the read
bandwidth measured there; without either there is no prediction. The cache is counted half full. What a token costs
beyond reading is left out: models far below 100 MB come out slower than this says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle import MODEL, Bundle, DecoderSpec
from edgekit.device import Device
from edgekit.errors import BudgetError, DeviceError, ModelError, UserError
from edgekit.profile.graph import read_graph
from edgekit.report import Measurement
from edgekit.runtime.budget import BASE_BYTES, PREFILL_CHUNK

GIB = 2**30
SYSTEM_SHARE = 0.06  # of the RAM, for firmware, kernel and page tables: an assumption, said wherever it is used
SYSTEM_BYTES = 200_000_000  # and what a system without a desktop runs: an assumption too
ARCHES = {"portable": "any", "x86": "x86_64", "arm": "aarch64", "npu-qnn": "any", "npu-openvino": "any"}  # of targets
LEAST_CONTEXT = 512  # tokens: with fewer a chat is no use
STEP = 64  # tokens
BLOCKS = 4096  # tokens: whole blocks of any cache


@dataclass(frozen=True)
class Footprint:
    """What a model takes: bytes of weights held and read per token, of cache and activations a token, of logits."""

    name: str
    arch: str
    weights_bytes: int
    read_bytes: int
    cache_bytes: int
    activation_bytes: int
    logits_bytes: int
    context_length: int
    parameters: int

    def total_bytes(self, context: int) -> int:
        """Predicted peak memory of a session over `context` tokens."""
        activations = self.activation_bytes * min(PREFILL_CHUNK, context) + self.logits_bytes
        return BASE_BYTES + self.weights_bytes + self.cache_bytes * context + activations


@dataclass(frozen=True)
class Fit:
    """A footprint on a device. `tokens_per_s` is None, and `reason` says why, where no bandwidth is known."""

    footprint: Footprint
    device: Device
    context: int
    ram_bytes: int
    tokens_per_s: float | None
    bandwidth_gbs: float | None
    reason: str

    @property
    def available_bytes(self) -> int:
        return max(0, int(self.ram_bytes * (1 - SYSTEM_SHARE)) - SYSTEM_BYTES)

    @property
    def needed_bytes(self) -> int:
        return self.footprint.total_bytes(self.context)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes

    @property
    def largest_context(self) -> int:
        """The longest context that fits, in whole steps of 64 tokens up to the model's; 0 where none does."""
        low, high = 0, self.footprint.context_length // STEP
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.footprint.total_bytes(middle * STEP) <= self.available_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * STEP

    def what_would_fit(self) -> str:
        """The way out: a shorter context, fewer bits, more memory, or a model of fewer parameters."""
        if self.largest_context >= min(LEAST_CONTEXT, self.footprint.context_length):
            return f"--context {self.largest_context} fits"
        ways = []
        room = self.available_bytes - (self.footprint.total_bytes(LEAST_CONTEXT) - self.footprint.weights_bytes)
        if room > 0:
            per_parameter = self.footprint.weights_bytes / self.footprint.parameters
            ways.append(f"a model of up to {_billions(room / per_parameter)} parameters at the same bits")
        larger = [
            size
            for size in sorted(self.device.ram_options_gb)
            if self.footprint.total_bytes(LEAST_CONTEXT) <= size * GIB * (1 - SYSTEM_SHARE) - SYSTEM_BYTES
        ]
        if larger:
            ways.append(f"a {self.device.title} with {larger[0]:g} GB")
        return " or ".join(ways) + " would fit" if ways else "nothing of its kind fits: use a smaller model"

    def refuse_if_too_large(self) -> None:
        """Raise BudgetError with the numbers and what would fit."""
        if not self.fits:
            raise BudgetError(
                f"the model must fit in the device's memory: {self.footprint.name} needs {_mb(self.needed_bytes)}"
                f" (weights {_mb(self.footprint.weights_bytes)}, cache of {self.context} tokens"
                f" {_mb(self.footprint.cache_bytes * self.context)}), {self.device.title} with"
                f" {self.ram_bytes / GIB:g} GB has {_mb(self.available_bytes)} for it; {self.what_would_fit()}"
            )

    def rows(self) -> tuple[Measurement, ...]:
        """The prediction as rows of a report."""
        where = self.device.title
        memory = f"{where}, {self.context} tokens; of {_mb(self.available_bytes)} (RAM less 6 % and 200 MB, assumed)"
        return (
            Measurement("fit: memory", self.needed_bytes / 1e6, "MB", "predicted", note=memory),
            Measurement("fit: largest context", self.largest_context, "tokens", "predicted", note=where),
            Measurement("fit: decode", self.tokens_per_s, "tok/s", "predicted", note=self.reason),
        )


def fit(footprint: Footprint, device: Device, *, context: int | None = None, ram_gb: float | None = None) -> Fit:
    """Predict `footprint` on `device`, over `context` tokens (default: the model's) and `ram_gb` GB of RAM.

    RAM defaults to the device's, else to the largest that it is sold with. Raises UserError: a context or RAM that
    cannot be, or RAM that is not known. DeviceError: the bundle is for another processor.
    """
    if footprint.arch not in ("any", device.arch):
        raise DeviceError(
            f"the bundle must be for the device's processor: {footprint.name} is for {footprint.arch}, {device.name} is"
            f" {device.arch}; export it again with --device {device.name}"
        )
    if context is not None and not 0 < context <= footprint.context_length:
        raise UserError(f"--context must be from 1 to the model's {footprint.context_length}: got {context}")
    if ram_gb is not None and not 0 < ram_gb < math.inf:
        raise UserError(f"--ram must be above zero: got {ram_gb:g}")
    if ram_gb is None and not device.ram_bytes and not device.ram_options_gb:
        raise UserError(f"the memory of {device.name} is not known; say how many GB it has with --ram")
    sold = max(device.ram_options_gb, default=0.0) * GIB
    ram = ram_gb * GIB if ram_gb is not None else device.ram_bytes or sold
    length = context or footprint.context_length
    threads = device.threads or 1
    decode = device.bandwidth_decode_gbs
    bandwidth = decode or device.read_gbs(threads)
    speed = None
    reason = f"the bandwidth of {device.title} is not known: measure it there with edgekit profile"
    if bandwidth is not None:
        speed = bandwidth * 1e9 / (footprint.read_bytes + footprint.cache_bytes * length // 2)
        kind = "decoding reaches" if decode else f"{threads} threads read"
        reason = f"{_mb(footprint.read_bytes)} of weights a token at the {bandwidth:g} GB/s that {kind} on it"
    return Fit(footprint, device, length, int(ram), speed, bandwidth, reason)


def bundle_footprint(path: Path) -> Footprint:
    """The footprint of a decoder's bundle, from its graph. Errors: as `Bundle.open`."""
    return spec_footprint(Bundle.open(path).spec, path)


def spec_footprint(spec: DecoderSpec, folder: Path) -> Footprint:
    """The footprint of the graph in `folder`, perhaps of a bundle in the making. Raises ModelError: a broken graph."""
    graph = read_graph(folder / MODEL)
    return Footprint(
        name=folder.name,
        arch=ARCHES.get(spec.target, "any"),
        weights_bytes=spec.resident_bytes,
        read_bytes=int(sum(graph.read_bytes().values())),
        cache_bytes=spec.cache_bytes(BLOCKS) // BLOCKS,
        activation_bytes=spec.activation_bytes,
        logits_bytes=spec.vocabulary * 4,
        context_length=spec.context_length,
        parameters=max(1, graph.parameters()),
    )


def config_footprint(path: Path, *, bits: float, head_bits: float | None = None, cache_bits: int = 16) -> Footprint:
    """The footprint that a model of a transformers `config.json` would have, its matrices at `bits` bits a weight.

    `bits` counts scales: 4-bit codes with a float16 scale for 32 of them are 4.5. `head_bits` is for the output head
    (and the table that it is tied to). Raises UserError: no such file, bits out of range. ModelError: numbers missing.
    """
    for name, value in {"--bits": bits, "--head-bits": bits if head_bits is None else head_bits}.items():
        if not 1 <= value <= 32:
            raise UserError(f"{name} must be from 1 to 32: got {value:g}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"a configuration must be readable: {path} ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"{path} must be JSON: {problem}") from problem
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object")
    hidden, mlp, layers, heads, vocabulary = (
        _count(config, key, path)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    kv_heads = _count(config, "num_key_value_heads", path) if "num_key_value_heads" in config else heads
    width = _count(config, "head_dim", path) if config.get("head_dim") else max(1, hidden // heads)
    tied = bool(config.get("tie_word_embeddings", False))
    body = layers * (2 * hidden * width * (heads + kv_heads) + 3 * hidden * mlp)
    table = vocabulary * hidden
    head_bytes = int(table * (bits if head_bits is None else head_bits) / 8)
    body_bytes = int(body * bits / 8) + 4 * hidden * (2 * layers + 1)
    return Footprint(
        name=path.parent.name or path.name,
        arch="any",
        weights_bytes=body_bytes + head_bytes + (0 if tied else int(table * bits / 8)),
        read_bytes=body_bytes + head_bytes,
        cache_bytes=layers * 2 * kv_heads * width * cache_bits // 8,
        activation_bytes=4 * (4 * hidden + 3 * heads * width + 3 * mlp),
        logits_bytes=4 * vocabulary,
        context_length=_count(config, "max_position_embeddings", path),
        parameters=body + table * (1 if tied else 2),
    )


def _count(config: Mapping[str, object], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ModelError(f"{path}: {key} must be a positive integer: got {value!r:.60}")
    return value


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _billions(count: float) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
