"""Calibration for the runner: which block reads what, walked along with it; and a survey of the whole model before.

`Walk` holds the stream of hidden states (`edgekit.model.calibration`). Beside the stream of the model as compressed so
far it carries, for a step that needs originals, the stream of the model as it stood before that step. After a kill it
is walked again through the shards that are done, so that nothing of it has to be kept on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import safetensors.numpy
from numpy.typing import NDArray

from edgekit.checkpoint import Block, Checkpoint, Entry
from edgekit.errors import ModelError, UserError
from edgekit.model.calibration import LayerInputs, Room, Stream
from edgekit.model.torch_view import torch_device
from edgekit.model.windows import Windows, token_windows
from edgekit.recipe import Recipe
from edgekit.step import CalibrationRecord, Changes, Inputs, InputStatistics, Remover, Step, StepContext

TABLE = "model.embed_tokens"
PREVIEW = 4  # windows from which a tied table's readers are known before any block is compressed


@dataclass
class Walk:
    """The calibration of one run. `context` is what steps get beside the inputs; `source` is nobody's yet."""

    source: Checkpoint
    prepared: Checkpoint
    steps: tuple[Step, ...]
    context: StepContext
    windows: Windows
    room: Room

    def __post_init__(self) -> None:
        self._stream = Stream(self.windows, self.context.decoder, self.room)
        self._beside = Stream(self.windows, self.context.decoder, self.room)
        self._layer: LayerInputs | None = None
        self._layer_beside: LayerInputs | None = None
        self._original: Block | None = None

    @property
    def record(self) -> CalibrationRecord:
        return self.windows.record

    def follow(self, prepared: Checkpoint, steps: tuple[Step, ...], context: StepContext) -> None:
        """Go by the plans that steps have made since, before the first block."""
        self.prepared, self.steps, self.context = prepared, steps, context
        self.__post_init__()

    def apply(self, index: int, block: Block) -> tuple[Block, Changes]:
        """Take a block through one step. Whoever takes it through the last one then calls `leave`."""
        step = self.steps[index]
        inputs = None if step.needs == "weights" else self._inputs(index, block)
        return step.apply(block, dataclasses.replace(self.context, inputs=inputs))

    def leave(self, block: Block) -> None:
        """Run the block as compressed, to have the inputs of the next."""
        _go_on(self._stream, self._layer, block)
        if self._follows:
            original = self._original
            assert original is not None, "the step that needs originals has seen the block"
            _go_on(self._beside, self._layer_beside, original)
        self._layer = self._layer_beside = self._original = None

    def replay(self, block: Block) -> None:
        """Walk past a block that an earlier run has compressed."""
        if block.name.startswith("layers."):
            self._layer = self._stream.inputs()
        if self._follows:
            before = self.prepared.read_block(block.name)
            for index, step in enumerate(self.steps):
                if step.needs == "originals":
                    break
                before, _ = self.apply(index, before)
            self._meet_original(before)
        self.leave(block)

    @property
    def _follows(self) -> bool:
        return any(step.needs == "originals" for step in self.steps)

    def _inputs(self, index: int, block: Block) -> Inputs | None:
        if self.steps[index].needs == "originals":
            self._meet_original(block)
        if block.name == "embedding":
            return _TableInputs(self, index) if self.context.decoder.tied else None
        if block.name == "final":
            return self._stream.final()
        if self._layer is None:
            self._layer = self._stream.inputs()
        self._layer.original = None
        if self.steps[index].needs == "originals":
            assert self._layer_beside is not None
            assert self._original is not None
            self._layer.original = self._layer_beside, self._original
        return self._layer

    def _meet_original(self, block: Block) -> None:
        """Stand before the layer of the original that `block` is to be like; run those that are gone."""
        step = next(step for step in self.steps if step.needs == "originals")
        if block.name.startswith("layers."):
            *gone, last = step.stands_for(block.name) if isinstance(step, Remover) else (block.name,)
            for name in gone:
                self._beside.advance(self._beside.inputs(), self._before(step, name))
            block = self._before(step, last) if isinstance(step, Remover) else block
            self._layer_beside = self._beside.inputs()
        self._original = block

    def _before(self, step: Step, name: str) -> Block:
        """A block of the model before `step`, and what it does to the model's layers."""
        index = self.steps.index(step)
        checkpoint = self.source
        for earlier in self.steps[:index]:
            checkpoint = earlier.prepare(checkpoint)
        return _with_weights_alone(checkpoint.read_block(name), self.steps[:index], self.context)

    def preview(self, index: int) -> InputStatistics:
        """What the head reads in the model before step `index`, from a few windows."""
        windows = dataclasses.replace(self.windows, ids=self.windows.ids[:PREVIEW])
        stream = Stream(windows, self.context.decoder, self.room)
        final = None
        for block in before_step(self.prepared, self.steps, index, self.context):
            if block.name == "embedding":
                stream.begin(block.matrices[TABLE])
            elif block.name == "final":
                final = stream.final().statistics(block, TABLE)
            else:
                stream.advance(stream.inputs(), block)
        if final is None:
            raise ModelError("the model must have a final norm: its weights lack it")
        return final


@dataclass(frozen=True)
class _TableInputs:
    """What a tied table reads as the head: known before its blocks only from a preview, made when asked for."""

    walk: Walk
    index: int

    def statistics(self, block: Block, module: str) -> InputStatistics:
        return self.walk.preview(self.index)


def _go_on(stream: Stream, layer: LayerInputs | None, block: Block) -> None:
    if block.name == "embedding":
        stream.begin(block.matrices[TABLE])
    elif block.name != "final":
        stream.advance(layer or stream.inputs(), block)


def before_step(prepared: Checkpoint, steps: tuple[Step, ...], index: int, context: StepContext) -> Iterator[Block]:
    """All blocks as step `index` will meet them, but for steps before it that need calibration themselves."""
    for name in prepared.blocks:
        yield _with_weights_alone(prepared.read_block(name), steps[:index], context)


def _with_weights_alone(block: Block, steps: tuple[Step, ...], context: StepContext) -> Block:
    for step in steps:
        if step.needs == "weights":
            block, _ = step.apply(block, context)
    return block


def begin_walk(
    source: Checkpoint,
    prepared: Checkpoint,
    recipe: Recipe,
    context: StepContext,
    folder: Path,
    limit: int | None,
    compute: str = "cpu",
) -> Walk:
    """Read the calibration text of `recipe` and stand before the first block.

    States beyond `limit` bytes (half of the free memory when None) spill to `folder`; layers run on the torch device
    `compute`. Raises UserError: two steps need originals, the text is no good, or there is no such device;
    ModelError: the model has no tokenizer.
    """
    if sum(step.needs == "originals" for step in recipe.steps) > 1:
        raise UserError("one step of a recipe may follow the original model: this recipe has more")
    windows = token_windows(prepared, recipe.calibration, seed=recipe.seed)
    limit = psutil.virtual_memory().available // 2 if limit is None else limit
    room = Room(folder, limit, torch_device(compute))
    return Walk(source, prepared, recipe.steps, context, windows, room)


@dataclass(frozen=True)
class Survey:
    """The whole model as a step will meet it, and the calibration windows, for `Surveyor.survey`.

    `blocks()` reads them one at a time, as often as asked. `report` is told (done, total).
    """

    decoder: Any
    windows: Windows
    room: Room
    names: tuple[str, ...]
    block: Callable[[str], Block]
    report: Callable[[int, int], None]


def survey_of(walk: Walk, index: int, report: Callable[[int, int], None]) -> Survey:
    """The survey for step `index`."""

    def block(name: str) -> Block:
        return _with_weights_alone(walk.prepared.read_block(name), walk.steps[:index], walk.context)

    return Survey(walk.context.decoder, walk.windows, walk.room, tuple(walk.prepared.blocks), block, report)


# --- shards that are done ---------------------------------------------------------------------------------------------


def read_shard(path: Path, name: str, structure: Mapping[str, Entry], like: Checkpoint) -> Block:
    """The block of a finished shard."""
    tensors = safetensors.numpy.load_file(path)
    return dataclasses.replace(like, tensors=_Loaded(tensors), structure=structure).read_block(name)


@dataclass(frozen=True)
class _Loaded:
    """A TensorReader of tensors in memory."""

    tensors: Mapping[str, NDArray[Any]]

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def files(self) -> set[Path]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> NDArray[Any]:
        return self.tensors[name]
