"""The step `quant.keep`: take a GGUF's own codes as they are.

Matrices whose type our formats hold (`edgekit.model.gguf_codes`) are read as codes and not as floats, so nothing is
rounded and the file's quality is kept. Others are skipped, with the reason, and go to the next step as floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from edgekit.checkpoint import Block, Checkpoint, Entry
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.gguf import GgufReader
from edgekit.model.gguf_codes import FORMATS
from edgekit.step import Changes, Needs, Outline, Prediction, StepContext
from edgekit.weight import Quantized


@dataclass(frozen=True)
class Keep:
    """See the module. No options. It must be the first step, on a GGUF file."""

    name: ClassVar[str] = "quant.keep"
    needs: ClassVar[Needs] = "weights"

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """A view of the model whose matrices are codes where they can be."""
        reader = checkpoint.tensors
        if not isinstance(reader, GgufReader):
            raise UserError(
                f"quant.keep takes the codes of a .gguf file, as the first step: {checkpoint.source.name} is"
                f" {checkpoint.source.kind}; use quant.int4 or quant.int8"
            )
        structure = {}
        for name in reader.names():
            kind, shape = reader.kind(name), reader.shape(name)
            if name.endswith(".weight") and len(shape) == 2 and kind in FORMATS:
                form = FORMATS[kind]
                structure[name.removesuffix(".weight")] = Entry("quantized", form.bits, form.block, shape)
        return dataclasses.replace(checkpoint, tensors=_CodeReader(reader, structure), structure=structure)

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The block as it is."""
        kept = [module for module, weight in block.matrices.items() if isinstance(weight, Quantized)]
        skipped = [
            Skip(module, f"its type is none of {', '.join(FORMATS)}") for module in block.matrices if module not in kept
        ]
        return block, Changes(len(kept), skipped=tuple(skipped))

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        return Prediction(outline, 0.0, 0)


@dataclass(frozen=True)
class _CodeReader:
    """The tensors of a GGUF file, with codes, scales and minima in place of the weights of `structure`'s modules."""

    file: GgufReader
    structure: Mapping[str, Entry]

    def names(self) -> Sequence[str]:
        found = []
        for name in self.file.names():
            module = name.removesuffix(".weight")
            if module not in self.structure:
                found.append(name)
                continue
            leaves = ["codes", "scales"] + ["minima"] * FORMATS[self.file.kind(name)].minima
            found += [f"{module}.{leaf}" for leaf in leaves]
        return sorted(found)

    def files(self) -> set[Path]:
        return self.file.files()

    def shape(self, name: str) -> tuple[int, ...]:
        module, _, leaf = name.rpartition(".")
        if module not in self.structure or leaf not in ("codes", "scales", "minima"):
            return self.file.shape(name)
        entry = self.structure[module]
        rows, blocks = entry.shape[0], entry.shape[1] // entry.block
        return (rows, blocks, entry.block * entry.bits // 8) if leaf == "codes" else (rows, blocks)

    def read(self, name: str) -> NDArray[Any]:
        module, _, leaf = name.rpartition(".")
        if module not in self.structure or leaf not in ("codes", "scales", "minima"):
            return self.file.read(name)
        part: NDArray[Any] = getattr(self.file.codes(f"{module}.weight"), leaf)
        return part
