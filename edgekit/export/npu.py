"""Bundles for NPUs: graphs of fixed shapes, rounded to what the NPU computes in, and compiled where a compiler is.

The ranges of activations come from a float graph that reads `SAMPLE` tokens of a text, widened by `ROOM`: 16 bits have
room for it, and a value beyond its range would be cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.bundle import MODEL, PREFILL, LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.device import Device
from edgekit.errors import DeviceError, UserError
from edgekit.export.fit import usual_caches
from edgekit.export.graph import Graph
from edgekit.export.rounded import Range, Rounding
from edgekit.export.static import build_static
from edgekit.export.targets import Target
from edgekit.report import Measurement
from edgekit.runtime.providers import Choice, choose, plugin_devices
from edgekit.runtime.static import compiled_name, inputs, load_graph

SAMPLE = 512  # tokens
ROOM = 1.25
STARTS = 4  # for each piece of the sample, so many begin with no cache behind them
BEYOND = 16.0  # a hidden score lies at least so far below the least one: e^-16 is below half a step of 16 bits
USUAL = 4.0  # times the median over channels of a channel's largest value in the stream
STICKS_OUT = 8.0  # times the usual: from there the stream's channels get divisors
OBSERVER = "observer.onnx"


def build_npu(
    checkpoint: Checkpoint, folder: Path, *, context: int, chunk: int, rounded: bool, sample: Sequence[int]
) -> tuple[tuple[LayerCache, ...], Rounding]:
    """Write model.onnx, prefill.onnx and their weights; returns each layer's cache, and how activations are rounded.

    `rounded`: activations in 16 bits, by ranges from the tokens of `sample`; else in floats.
    """
    caches = usual_caches(checkpoint, "export for an NPU")
    with Graph(folder) as graph:

        def build(tokens: int, file: str, rounding: Rounding, *, observe: bool = False) -> None:
            build_static(
                checkpoint, graph, caches,
                tokens=tokens, context=context, rounding=rounding, file=file, observe=observe,
            )  # fmt: skip

        rounding = Rounding()
        if rounded:
            build(chunk, OBSERVER, rounding, observe=True)
            graph.flush()
            extremes = _observe(folder / OBSERVER, rounding, caches, sample, context=context, chunk=chunk)
            (folder / OBSERVER).unlink()
            rounding = rounding_for(rounding, extremes, len(caches))
        build(1, MODEL, rounding)
        build(chunk, PREFILL, rounding)
    return caches, rounding


def _observe(
    model: Path, rounding: Rounding, caches: Sequence[LayerCache], sample: Sequence[int], *, context: int, chunk: int
) -> list[NDArray[np.float32]]:
    """What the observer's outputs are over whole pieces of the sample: each after those before while the context lasts,
    and pieces that begin anew, for the first token of a text is where values are largest.

    They are the least and the largest values of tensors, (names, 1), and of the stream's channels, (names, hidden).
    """
    session = load_graph(model, 1, Choice("onnxruntime CPU"))
    names = [f"{index}.{part}" for index in range(len(caches)) for part in ("key", "value")]
    outputs = ("low", "high", "stream.low", "stream.high")
    found: list[NDArray[np.float32]] = []
    past = 0
    last = max(1, len(sample) - chunk + 1)
    pieces = [(start, False) for start in range(0, last, chunk)]
    pieces += [(start, True) for start in range(0, last, max(1, chunk // STARTS))]
    for start, anew in pieces:
        if past + chunk > context or not past or anew:
            past = 0
            cache = {
                f"past.{name}": np.zeros((1, layer.kv_heads, context, layer.head_dim), np.float32)
                for name, layer in zip(names, (layer for layer in caches for _ in range(2)), strict=True)
            }
        ids = sample[start : start + chunk]
        feeds = inputs(ids, past, length=chunk, context=context, hidden=rounding.hidden) | cache
        values = session.run([*outputs, *(f"new.{name}" for name in names)], feeds)
        extremes, new = values[: len(outputs)], values[len(outputs) :]
        pairs = zip((np.minimum, np.maximum) * 2, found or extremes, extremes, strict=True)
        found = [choose_extreme(before, now) for choose_extreme, before, now in pairs]
        for name, block in zip(names, new, strict=True):
            cache[f"past.{name}"][:, :, past : past + chunk] = block
        past += chunk
    return found


def rounding_for(names: Rounding, extremes: Sequence[NDArray[np.float32]], layers: int) -> Rounding:
    """Ranges from the extremes of the observer, whose graph left the names: see `edgekit.export.static`."""
    low, high, stream_low, stream_high = (ROOM * values.astype(np.float64) for values in extremes)
    ranges = {name: (float(a), float(b)) for name, a, b in zip(names.observed, low[:, 0], high[:, 0], strict=True)}
    largest = np.maximum(np.abs(stream_low), np.abs(stream_high)).max(0)  # of each channel
    usual = USUAL * float(np.median(largest))
    divisors = None
    if largest.max() > STICKS_OUT * usual:
        divisors = (2.0 ** np.ceil(np.log2(np.maximum(1, largest / usual)))).astype(np.float32)
        for name, a, b in zip(names.stream, stream_low / divisors, stream_high / divisors, strict=True):
            ranges[name] = (float(a.min()), float(b.max()))
        for norm, name in names.norms.items():
            index = names.stream.index(name)
            ranges[f"{norm}.whole"] = float(stream_low[index].min()), float(stream_high[index].max())
    ranges["model.embed_tokens.divided"] = ranges[names.stream[0]]
    return Rounding(ranges, hide(ranges, layers), divisors)


def hide(ranges: dict[str, Range], layers: int) -> float:
    """Set the ranges of the mask, and of what it is added to; returns what it takes away from a score to hide it."""
    attention = [f"model.layers.{index}.self_attn" for index in range(layers)]
    scores = [ranges[f"{layer}.scores"] for layer in attention]
    hidden = max(b - a for a, b in scores) + BEYOND
    ranges["mask"] = (-hidden, 0.0)
    for layer, (a, b) in zip(attention, scores, strict=True):
        ranges |= {f"{layer}.masked": (a - hidden, b), f"{layer}.shares": (0.0, 1.0)}
    return hidden


def compile_qnn(folder: Path, *, htp_arch: int, soc_model: int, files: Sequence[str] = (MODEL, PREFILL)) -> list[str]:
    """Compile graphs for a Hexagon version; returns what stayed on the CPU, one line a kind of operator.

    Raises DeviceError: onnxruntime-qnn is not installed, or its compiler refused a graph.
    """
    chosen = choose("qnn", "npu")
    target = (("htp_arch", str(htp_arch)), ("soc_model", str(soc_model)))
    finest = ("htp_graph_finalization_optimization_mode", "3")
    choice = Choice(chosen.name, chosen.devices, (chosen.options[0], finest, *target))
    left: list[str] = []
    for file in files:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        choice.apply(options)
        compiled = folder / compiled_name(file)
        entries = {"enable": "1", "embed_mode": "0", "file_path": str(compiled)}
        entries["model_external_initializers_file_name"] = f"{compiled.name}.data"
        for key, value in entries.items():
            options.add_session_config_entry(f"ep.context_{key}", value)
        try:
            ort.InferenceSession(str(folder / file), options)
        except Exception as problem:  # onnxruntime raises classes of its own, with no common base
            raise DeviceError(f"the QNN compiler refused {file}: {str(problem).strip()[:500]}") from problem
        nodes = onnx.load(str(compiled), load_external_data=False).graph.node
        left += [f"{file}: {line}" for line in _left(nodes)]
    return left


def hexagon(device: Device | None, target: Target) -> tuple[int, int] | None:
    """The Hexagon version and the number of the SoC to compile for; None without a device, or for another vendor's."""
    if device is None:
        return None
    npu = device.npu
    if npu is None:
        raise UserError(
            f"--target {target.name} needs an NPU: {device.title} has none; leave --device out to build for any"
        )
    if npu.provider != target.provider:
        made_by = f"--target npu-{npu.provider}" if npu.provider else "no target"
        raise UserError(f"--target {target.name} is not for {npu.name} of {device.title}, for which there is {made_by}")
    if target.provider != "qnn":
        return None
    if npu.htp_arch is None or npu.soc_model is None:
        raise UserError(f"compiling for {npu.name} needs htp_arch and soc_model in the device's [npu]")
    plugin_devices("qnn")  # raises where the compiler is missing, before the long work
    return npu.htp_arch, npu.soc_model


def compiled_record(folder: Path, htp: tuple[int, int], *, files: Sequence[str] = (MODEL, PREFILL)) -> Measurement:
    """Compile for what `hexagon` gave; the record names what stayed on the CPU. Raises DeviceError."""
    left = compile_qnn(folder, htp_arch=htp[0], soc_model=htp[1], files=files)
    return Measurement("compiled for Hexagon", float(htp[0]), "", note=f"left on the CPU: {'; '.join(left)}")


REASONS = {
    "Identity": "gives an output its name",
    "GatherBlockQuantized": "a table look-up in packed blocks; QNN has none",
    "Gather": "a look-up in a float table",
    "Reshape": "shapes the look-up's result",
    "QuantizeLinear": "rounds a float input on its way in",
    "DequantizeLinear": "makes floats of the logits on their way out",
}


def _left(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    counts = Counter(node.op_type for node in nodes)
    parts = counts.pop("EPContext", 0)
    lines = [f"{count} x {kind}: {REASONS.get(kind, 'not supported by QNN')}" for kind, count in sorted(counts.items())]
    return [f"{parts} compiled part{'s' if parts != 1 else ''}", *lines]
