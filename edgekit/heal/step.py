"""The step `heal.distill` of a recipe: the healing of `edgekit.heal.heal` between the passes that stream over blocks.

    [[step]]
    use = "heal.distill"
    teacher = "smollm2-135m"        # a model as `compress` takes it; left out: the one the recipe began with
    data = ["books.jsonl.gz"]       # beside the recipe; left out: the calibration files
    steps = 400

The command line's `--teacher MODEL` goes before what the recipe says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.heal.heal import Options
from edgekit.step import Changes, Needs, Outline, Prediction, StepContext


@dataclass(frozen=True)
class Distill(Options):
    """`edgekit.heal.heal.Options`, and where teacher and text lie."""

    name: ClassVar[str] = "heal.distill"
    teacher: str = ""
    data: tuple[str, ...] = ()

    @property
    def needs(self) -> Needs:
        return "model"

    @property
    def training_options(self) -> Options:
        """What `heal` takes."""
        return Options(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Options)})

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        raise UserError(f"{self.name} works on a whole model: `edgekit.passes` runs it between two passes")

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        return Prediction(outline, 0.0, 0)
