"""The step `merge.layers`: two neighbouring layers become one, their weights averaged.

    theta = lambda theta_l + (1 - lambda) theta_m,      m = l + 1, the merged layer in the place of l

Which pairs: those of highest similarity (`edgekit.merge.similarity`, MKA's NPIB unless told otherwise), greedily;
lambda is the pair's similarity, brought into [0.5, 0.9]: the adaptive ratio of MKA's text. With `match` the neurons of
m are first brought into the order in which they are most like those of l (Hungarian method on the unit rows of gate
and up). Norms are averaged too. With `repair` the merged layer's o and down are then refitted so
that its output is that of layer m in the original, and those of the layers behind it as in `edgekit.merge.drop`.

Sources: Liu et al., MKA, arXiv 2406.16330, section 3; matching as in Ainsworth et al., Git Re-Basin, arXiv 2209.04836.
Not supported: layers of different shapes are not merged; more than two layers in one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint, TensorReader
from edgekit.errors import UserError
from edgekit.merge.drop import Drop
from edgekit.merge.similarity import MEASURES, Doubles, Measure, similarities
from edgekit.model.heads import refuse_thin_heads
from edgekit.weight import Floats

if TYPE_CHECKING:
    from edgekit.calibrate import Survey

NUMBER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
LEAST, MOST = 0.5, 0.9  # of lambda


@dataclass(frozen=True)
class Merge(Drop):
    """count, layers, repair, damping, reach: as `Drop`; `layers` names the second of each pair. measure: of similarity.
    ratio: lambda; 0 takes the similarity. match: neurons first. ratios: the plan's own, one for each of `layers`."""

    name: ClassVar[str] = "merge.layers"
    measure: Measure = "npib"
    ratio: float = 0.0
    match: bool = True
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure not in MEASURES:
            raise UserError(f"measure must be one of {', '.join(MEASURES)}: got {self.measure!r}")
        if not 0 <= self.ratio < 1 or any(not 0 < ratio < 1 for ratio in self.ratios):
            raise UserError(f"a ratio must be above 0 and below 1: got {self.ratio}, {list(self.ratios)}")
        if 0 in self.layers or any(layer - 1 in self.layers for layer in self.layers):
            raise UserError(f"merge.layers joins pairs of layers, named by the second: got {list(self.layers)}")
        if self.ratios and len(self.ratios) != len(self.layers):
            raise UserError(f"ratios must be as many as layers: got {len(self.ratios)} for {len(self.layers)}")

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model with its pairs joined; tensors are averaged when they are read."""
        refuse_thin_heads(checkpoint, self.name)
        total = checkpoint.decoder.layers
        if 2 * self.count > total:
            raise UserError(f"merge.layers joins pairs: {self.count} pairs need {2 * self.count} layers of {total}")
        seen = super().prepare(checkpoint)
        if not self.layers:
            return checkpoint
        if checkpoint.structure:
            raise UserError("merge.layers averages floats: the model is quantised; merge before quantising")
        ratios = self.ratios or tuple(self.ratio or LEAST for _ in self.layers)
        numbers = [layer for layer in range(total) if layer not in self.layers]
        pairs = {numbers.index(second - 1): (second, ratio) for second, ratio in zip(self.layers, ratios, strict=True)}
        return dataclasses.replace(seen, tensors=Averaged(seen.tensors, checkpoint, pairs, self.match))

    def survey(self, survey: Survey) -> Merge:
        """The step with the pairs of highest similarity and their ratios."""
        if self.layers:
            return self
        table = similarities(pooled_states(survey), self.measure)
        found = pairs_of(table, self.count)
        ratios = tuple(self.ratio or float(np.clip(table[second - 1, second], LEAST, MOST)) for second in found)
        return dataclasses.replace(self, count=0, layers=found, ratios=ratios)

    def stands_for(self, name: str) -> tuple[str, ...]:
        """The pair, or the layer itself."""
        index, original = int(name.removeprefix("layers.")), 0
        while True:
            if original not in self.layers:
                if index == 0:
                    break
                index -= 1
            original += 1
        pair = original + 1 in self.layers
        return (f"layers.{original}", f"layers.{original + 1}") if pair else (f"layers.{original}",)


def pairs_of(table: Doubles, count: int) -> tuple[int, ...]:
    """The second layers of `count` pairs of neighbours, the most alike first, none in two pairs; sorted.

    The last layer, whose outputs the head reads, is in no pair unless there is no other. Raises UserError when there
    are not so many.
    """
    layers = len(table)
    order = sorted(range(1, layers), key=lambda second: (second == layers - 1, -table[second - 1, second]))
    found = list[int]()
    for second in order:
        if len(found) < count and not {second - 1, second, second + 1} & set(found):
            found.append(second)
    if len(found) < count:
        raise UserError(f"merge.layers found {len(found)} pairs of neighbours that do not overlap: got count {count}")
    return tuple(sorted(found))


def pooled_states(survey: Survey) -> list[Doubles]:
    """Each layer's output, the mean over a window's tokens: (windows, hidden)."""
    from edgekit.model.calibration import Stream

    stream = Stream(survey.windows, survey.decoder, survey.room)
    stream.begin(survey.block("embedding").matrices["model.embed_tokens"])
    names = [name for name in survey.names if name.startswith("layers.")]
    found = []
    for index, name in enumerate(names):
        stream.advance(stream.inputs(), survey.block(name))
        assert stream.states is not None, "begin comes first"
        found.append(np.asarray(stream.states[:, 1:].mean(1), np.float64))  # the first token's state dwarfs all others
        survey.report(index + 1, len(names))
    return found


@dataclass(frozen=True)
class Averaged:
    """A TensorReader in which some layers are averages: `pairs` maps a layer to (second layer of `whole`, ratio)."""

    seen: TensorReader
    whole: Checkpoint
    pairs: Mapping[int, tuple[int, float]]
    match: bool

    def names(self) -> Sequence[str]:
        return self.seen.names()

    def files(self) -> set[Path]:
        return self.seen.files()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.seen.shape(name)

    def read(self, name: str) -> NDArray[Any]:
        found = NUMBER.match(name)
        if found is None or int(found[1]) not in self.pairs:
            return self.seen.read(name)
        second, ratio = self.pairs[int(found[1])]
        ours = self.seen.read(name).astype(np.float32)
        theirs = self.whole.tensors.read(f"model.layers.{second}.{found[2]}").astype(np.float32)
        if ours.shape != theirs.shape:
            raise UserError(f"merge.layers joins layers of one shape: {name} has {ours.shape} and {theirs.shape}")
        if self.match and found[2].startswith("mlp."):
            order = self._order(second)
            if "down_proj" in found[2]:
                theirs = theirs[:, order] if theirs.ndim == 2 else theirs
            else:
                theirs = theirs[order]
        merged: Floats = np.float32(ratio) * ours + np.float32(1 - ratio) * theirs
        return np.ascontiguousarray(merged)

    def _order(self, second: int) -> NDArray[np.int64]:
        if second not in self._orders:
            self._orders[second] = self._matched(second)
        return self._orders[second]

    @cached_property
    def _orders(self) -> dict[int, NDArray[np.int64]]:
        return {}

    def _matched(self, second: int) -> NDArray[np.int64]:
        """For each neuron of the first layer, the one of the second that is most like it."""
        from scipy.optimize import linear_sum_assignment

        alike: Any = 0.0
        for leaf in ("gate_proj", "up_proj"):
            one, other = (
                self.whole.weight(f"model.layers.{layer}.mlp.{leaf}").dense() for layer in (second - 1, second)
            )
            alike = alike + _unit(one) @ _unit(other).T
        return np.asarray(linear_sum_assignment(-alike)[1], np.int64)


def _unit(W: Floats) -> Floats:
    norms = np.linalg.norm(W, axis=1, keepdims=True)
    return np.asarray(W / np.where(norms > 0, norms, 1), np.float32)
