"""What the steps that factor matrices have in common: which matrices they are asked for, and what they report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from edgekit.checkpoint import Checkpoint
from edgekit.errors import UserError
from edgekit.step import Fact


def refuse_strays(step: str, patterns: Sequence[str], checkpoint: Checkpoint) -> None:
    """Raises UserError: a pattern of module paths that matches no matrix of the model."""
    modules = [module for matrices, _ in checkpoint.blocks.values() for module in matrices]
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise UserError(f"{step}: each pattern of modules must match one: {pattern!r} matches none")


def is_named(module: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def error_facts(errors: Sequence[tuple[float, float]], *, of_outputs: bool) -> dict[str, Fact]:
    """The relative error of a block's matrices together, from (squared error, squared size) of each; empty for none."""
    if not errors:
        return {}
    error, power = (math.fsum(column) for column in zip(*errors, strict=True))
    name = "relative_output_error" if of_outputs else "relative_error"
    return {name: Fact(math.sqrt(error / power) if power else 0.0, "rms", power)}
