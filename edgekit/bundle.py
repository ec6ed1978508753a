"""The bundle: a folder that runs with the light install.

model.onnx + model.onnx.data    the graph and its weights, which are memory-mapped
runtime.json                    what the runtime must know of the model: `DecoderSpec`
tokenizer.json, chat_template.jinja, ...
report.json                     what was measured at export
recipe.toml                     how it was compressed
edgekit.json                    the manifest, with a digest for every file
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.errors import ModelError, UserError
from edgekit.folder import inside
from edgekit.manifest import Manifest
from edgekit.schema import parse

SPEC = "runtime.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: keys and values of `kv_heads` heads of `head_dim` channels each."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class DecoderSpec:
    """What the runtime must know of a decoder graph beyond the graph itself.

    `resident_bytes` is what the weights take in memory once they are loaded, `activation_bytes` what one token's
    activations take. `operators` says whose the graph's are: with "edgekit" the kernel library is registered where
    there is one, and the cache is float16; "stock" graphs keep it in float32.
    """

    architecture: str
    target: str
    vocabulary: int
    context_length: int
    layers: tuple[LayerCache, ...]
    eos_ids: tuple[int, ...]
    resident_bytes: int
    activation_bytes: int
    operators: Literal["stock", "edgekit"] = "stock"

    def __post_init__(self) -> None:
        sizes = {"vocabulary": self.vocabulary, "context_length": self.context_length, "layers": len(self.layers)}
        for index, layer in enumerate(self.layers):
            sizes |= {f"layers[{index}].kv_heads": layer.kv_heads, f"layers[{index}].head_dim": layer.head_dim}
        for name, size in sizes.items():
            if not 0 < size <= 1 << 24:
                raise ModelError(f"{name} must be from 1 to {1 << 24}: got {size}")
        if self.resident_bytes < 0 or self.activation_bytes < 0:
            raise ModelError(f"bytes must not be below 0: got {self.resident_bytes} and {self.activation_bytes}")

    @property
    def cache_type(self) -> np.dtype[Any]:
        """The element type of keys and values."""
        return np.dtype(np.float16 if self.operators == "edgekit" else np.float32)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that keys and values of `tokens` tokens take."""
        numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers)
        return numbers * self.cache_type.itemsize * tokens

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file is there and has its digest."""

    path: Path
    manifest: Manifest
    spec: DecoderSpec

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open and verify a bundle. Raises UserError when there is none at `path`, ModelError when it is not whole."""
        if not path.is_dir():
            raise UserError(f"a bundle must be a folder: {path} is none; make one with edgekit export")
        manifest = Manifest.load(path)
        if manifest.kind != "bundle":
            raise UserError(
                f"{path} is a {manifest.kind}, which does not run yet; make a bundle with edgekit export {path}"
            )
        for name in (MODEL, WEIGHTS, SPEC):
            if name not in manifest.files:
                raise ModelError(f"the bundle {path} must hold {name}; export it again")
        try:
            data = json.loads((path / SPEC).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            raise ModelError(f"{path / SPEC} must be readable JSON: {problem}") from problem
        return cls(path, manifest, parse(DecoderSpec, data, where=str(path / SPEC), error=ModelError))

    def file(self, name: str) -> Path:
        """A file that the manifest lists. Raises ModelError when it does not: nothing unlisted is ever read."""
        if name not in self.manifest.files:
            raise ModelError(f"the bundle {self.path} must hold {name}; export it again")
        return inside(self.path, name)

    def has(self, name: str) -> bool:
        return name in self.manifest.files
