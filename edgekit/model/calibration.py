"""Calibration: what each matrix of a model reads on a text.

The hidden states of the text's windows (`edgekit.model.windows`) walk through the model block by block, always
through the blocks as compressed so far, so that a step sees the inputs that its matrices will really have. For a matrix
that reads rows x_t (of T tokens in all), a step may ask for

    gram      sum_t x_t x_t^T               (in, in) float64
    mean_abs  1/T sum_t |x_t|               (in,) float64
    max_abs   max_t |x_t|                   (in,) float64
    cross     sum_t x'_t x_t^T              (in', in): x' what the uncompressed model's matrix W' reads there
    drift     sum_t (r'_t - r_t) x_t^T      (out, in): how far the residual stream has moved, for those that write to it
    aim       W' cross + drift              (out, in): what those must add to the stream to bring it where it was

Within a layer the stages are run one after another with what is compressed already, and each is run once: a stage is
kept until a matrix before it changes. States lie in memory up to a limit, beyond it in files without a name, which the
system removes whatever happens. The products are float32 over a few windows at a time, their sums float64.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekit.checkpoint import Block
from edgekit.errors import ModelError
from edgekit.model.config import DecoderConfig
from edgekit.model.stages import Stage, stage_of
from edgekit.model.torch_view import CPU, Layer, rms_norm
from edgekit.model.windows import Windows
from edgekit.step import InputStatistics
from edgekit.weight import Floats, Weight

TOKENS_AT_ONCE = 2048
FINAL_NORM = "model.norm.weight"
WRITERS: dict[str, str] = {"mixed": "self_attn.o_proj", "gated": "mlp.down_proj"}  # who writes a stage to the stream


# --- states -----------------------------------------------------------------------------------------------------------


class Room:
    """Where states lie: in memory up to `limit_bytes`, beyond it in unnamed files in `folder`. Layers run on `compute`,
    a torch device, to which a few windows at a time are copied."""

    def __init__(self, folder: Path, limit_bytes: int, compute: torch.device = CPU) -> None:
        self.folder, self.left, self.compute = folder, limit_bytes, compute

    def take(self, shape: tuple[int, ...]) -> Floats:
        """An array (shape) float32; give it back with `give` to free its part of the limit."""
        size = 4 * int(np.prod(shape))
        if size <= self.left:
            self.left -= size
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=self.folder) as file:  # the mapping outlives its name and handle
            return np.memmap(file, np.float32, "w+", shape=shape)

    def give(self, array: Floats | None) -> None:
        if array is not None and not isinstance(array, np.memmap):
            self.left += array.nbytes


class LayerInputs:
    """What the matrices of one decoder layer read, at one depth of the stream. Implements `edgekit.step.Inputs`."""

    def __init__(
        self, states: Floats, config: DecoderConfig, room: Room, original: tuple[LayerInputs, Block] | None = None
    ) -> None:
        self.states, self.config, self.room, self.original = states, config, room, original
        self._kept: dict[str, tuple[tuple[object, ...], Floats]] = {}
        self._found: dict[tuple[Stage, bool], tuple[tuple[object, ...], InputStatistics]] = {}

    def statistics(self, block: Block, module: str) -> InputStatistics:
        """What `module` reads, with the matrices of `block` before it. Raises ModelError: it is no linear of a layer,
        or states are not finite."""
        stage = stage_of(module)
        if stage is None:
            raise ModelError(f"calibration must know what each matrix reads: it does not know {module}")
        key = _before(block, stage)
        found = self._found.get((stage, self.original is not None))
        if found is not None and _same(found[0], key):
            return found[1]
        statistics = self._sum(block, stage, module)
        self._found[stage, self.original is not None] = key, statistics
        return statistics

    def output(self, block: Block) -> Floats:
        """The layer's output for all windows, (samples, length, hidden); the stages are given back."""
        layer = self._layer(block)
        residual, gated = self._stage(block, "residual"), self._stage(block, "gated")
        result = self.room.take(self.states.shape)
        for part in self._parts():
            y = layer.add(self._tensor(residual[part]), "mlp.down_proj", self._tensor(gated[part]))
            result[part] = y.numpy(force=True)
        for _, array in self._kept.values():
            self.room.give(array)
        self._kept.clear()
        self._found.clear()
        return result

    def _sum(self, block: Block, stage: Stage, module: str) -> InputStatistics:
        layer = self._layer(block)
        x, source = self._reads(block, stage)
        width = self._width(layer, stage)
        sums = _Sums(width, self.room.compute)
        cross = drift = None
        if self.original is not None:
            there, whole = self.original
            other, its_source = there._reads(whole, stage)
            its_layer = self._layer(whole)
            cross = sums.gram.new_zeros(self._width(its_layer, stage), width)
            drift = sums.gram.new_zeros(self.config.hidden_size, width)
        for part in self._parts():
            rows = _at(layer, stage, self._tensor(x[part])).flatten(0, 1)
            sums.add(rows)
            if self.original is not None:
                rows_there = _at(its_layer, stage, self._tensor(other[part])).flatten(0, 1)
                cross += (rows_there.T @ rows).double()
                moved = self._tensor(its_source[part]) - self._tensor(source[part])
                drift += (moved.flatten(0, 1).T @ rows).double()
        if cross is None or drift is None:
            return sums.statistics(module)
        writer = WRITERS.get(stage)
        return dataclasses.replace(
            sums.statistics(module),
            cross=cross.numpy(force=True),
            drift=drift.numpy(force=True),
            aim=None if writer is None else (its_layer.matrices[writer].double() @ cross + drift).numpy(force=True),
        )

    def _reads(self, block: Block, stage: Stage) -> tuple[Floats, Floats]:
        """What the stage is computed from, and the residual stream that its readers' outputs join."""
        if stage == "attention_input":
            return self.states, self.states
        if stage == "mixed":
            return self._stage(block, "mixed"), self.states
        residual = self._stage(block, "residual")
        return (residual if stage == "mlp_input" else self._stage(block, "gated")), residual

    def _width(self, layer: Layer, stage: Stage) -> int:
        leaf = {"attention_input": "self_attn.q_proj", "mixed": "self_attn.o_proj", "mlp_input": "mlp.up_proj"}
        return int(layer.matrices[leaf.get(stage, "mlp.down_proj")].shape[1])

    def _stage(self, block: Block, name: str) -> Floats:
        """`mixed`, `residual` or `gated` for all windows, run again only when something before it changed."""
        key = _before(block, name)
        kept = self._kept.get(name)
        if kept is not None and _same(kept[0], key):
            return kept[1]
        if kept is not None:
            self.room.give(self._kept.pop(name)[1])
        layer = self._layer(block)
        samples, length, hidden = self.states.shape
        if name == "residual":
            mixed = self._stage(block, "mixed")
            result = self.room.take((samples, length, hidden))
            for part in self._parts():
                y = layer.add(self._tensor(self.states[part]), "self_attn.o_proj", self._tensor(mixed[part]))
                result[part] = y.numpy(force=True)
        elif name == "mixed":
            result = self.room.take((samples, length, layer.matrices["self_attn.o_proj"].shape[1]))
            for part in self._parts():
                result[part] = layer.mixed(layer.attention_input(self._tensor(self.states[part]))).numpy(force=True)
        else:
            residual = self._stage(block, "residual")
            result = self.room.take((samples, length, layer.matrices["mlp.down_proj"].shape[1]))
            for part in self._parts():
                result[part] = layer.gated(layer.mlp_input(self._tensor(residual[part]))).numpy(force=True)
        self._kept[name] = key, result
        return result

    def _layer(self, block: Block) -> Layer:
        return Layer.of(block, self.config, self.room.compute)

    def _tensor(self, array: Floats) -> Tensor:
        return _tensor(array, self.room.compute)

    def _parts(self) -> Iterator[slice]:
        samples, length, _ = self.states.shape
        step = max(1, TOKENS_AT_ONCE // length)
        return (slice(start, min(start + step, samples)) for start in range(0, samples, step))


class _Sums:
    """Statistics of rows (tokens, in) that come a few at a time."""

    def __init__(self, width: int, compute: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=compute)
        self.total, self.most = self.gram.new_zeros(width), self.gram.new_zeros(width)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        self.gram += _square(rows).double()
        sizes = rows.abs()
        self.total += sizes.sum(0).double()
        self.most = torch.maximum(self.most, sizes.amax(0).double())
        self.tokens += len(rows)

    def statistics(self, module: str) -> InputStatistics:
        if not torch.isfinite(self.gram).all():
            raise ModelError(
                f"what {module} reads must be finite on the calibration text: it is not; the weights are damaged"
            )
        mean = self.total / self.tokens
        return InputStatistics(
            self.gram.numpy(force=True), mean.numpy(force=True), self.most.numpy(force=True), self.tokens
        )


def _square(rows: Tensor) -> Tensor:
    """rows^T rows"""
    if rows.device.type != "cpu":
        return rows.T @ rows
    values = rows.numpy()
    return torch.from_numpy(values.T @ values)  # NumPy sees that it is symmetric: half of the work


def _at(layer: Layer, stage: Stage, values: Tensor) -> Tensor:
    """The stage's values from what `LayerInputs._reads` gives."""
    if stage == "attention_input":
        return layer.attention_input(values)
    return layer.mlp_input(values) if stage == "mlp_input" else values


_ORDER: dict[str, int] = {"attention_input": 0, "mixed": 1, "residual": 2, "mlp_input": 2, "gated": 3}
_LAST_BEFORE = {"self_attn.q": 1, "self_attn.k": 1, "self_attn.v": 1, "self_attn.o": 2, "mlp.gate": 3, "mlp.up": 3}
_NORMS_BEFORE = {"input_layernorm": 0, "post_attention_layernorm": 2, "self_attn.q_norm": 1, "self_attn.k_norm": 1}


def _before(block: Block, stage: str) -> tuple[object, ...]:
    """All matrices and vectors of the block that decide a stage."""
    places = _LAST_BEFORE | _NORMS_BEFORE
    parts = [*sorted(block.matrices.items()), *sorted(block.vectors.items())]
    return tuple(part for name, part in parts if any(f".{at}" in name and places[at] <= _ORDER[stage] for at in places))


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _tensor(array: Floats, compute: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(compute)


class FinalInputs:
    """What the head reads: the final states, normed."""

    def __init__(self, states: Floats, config: DecoderConfig, compute: torch.device) -> None:
        self.states, self.config, self.compute = states, config, compute

    def statistics(self, block: Block, module: str) -> InputStatistics:
        """Raises ModelError: the block has no final norm, or states are not finite."""
        if FINAL_NORM not in block.vectors:
            raise ModelError(f"the model must have {FINAL_NORM}: its weights lack it")
        gain = _tensor(block.vectors[FINAL_NORM], self.compute)
        sums = _Sums(self.states.shape[-1], self.compute)
        for window in self.states:
            sums.add(rms_norm(_tensor(window, self.compute), gain, self.config.norm_eps))
        return sums.statistics(module)


# --- the stream -------------------------------------------------------------------------------------------------------


class Stream:
    """The hidden states of all windows, advanced block by block."""

    def __init__(self, windows: Windows, config: DecoderConfig, room: Room) -> None:
        self.windows, self.config, self.room = windows, config, room
        self.states: Floats | None = None

    def begin(self, table: Weight) -> None:
        """Look the tokens up in the token table."""
        samples, length = self.windows.ids.shape
        values = table.dense()
        self.states = self.room.take((samples, length, values.shape[1]))
        for state, ids in zip(self.states, self.windows.ids, strict=True):
            state[:] = values[ids]

    def inputs(self, original: tuple[LayerInputs, Block] | None = None) -> LayerInputs:
        """What the next layer's matrices read."""
        assert self.states is not None, "begin comes first"
        return LayerInputs(self.states, self.config, self.room, original)

    def final(self) -> FinalInputs:
        assert self.states is not None, "begin comes first"
        return FinalInputs(self.states, self.config, self.room.compute)

    def advance(self, inputs: LayerInputs, block: Block) -> None:
        """Go on behind `block`, whose inputs these are."""
        before = self.states
        self.states = inputs.output(block)
        self.room.give(before)
