"""The bundle: a folder that runs with the light install.

model.onnx + model.onnx.data    the graph and its weights, which are memory-mapped
runtime.json                    what the runtime must know of the model: `DecoderSpec`, or `EncoderSpec`
tokenizer.json, chat_template.jinja, ...
report.json                     what was measured at export
recipe.toml                     how it was compressed
edgekit.json                    the manifest, with a digest for every file
"""

from __future__ import annotations

import dataclasses
import json
import math
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
PREFILL = "prefill.onnx"
WEIGHTS = "model.onnx.data"
PAGE = 16  # positions that share a mean value in a sparse cache
BLOCK = 256  # positions whose codes stand together there


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: keys and values of `kv_heads` heads of `head_dim` channels each.

    A `sparse` layer also keeps codes of the keys and mean values of pages (`edgekit.kernels.sparse`).
    """

    kv_heads: int
    head_dim: int
    sparse: bool = False

    def code_shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of a sparse layer's codes of `tokens` positions: whole blocks, on average two bits a channel."""
        return 1, self.kv_heads, -(-tokens // BLOCK) * BLOCK * self.head_dim // 4

    def mean_shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of a sparse layer's mean values of `tokens` positions: a row in 8 bits and a scale for each page,
        whole blocks."""
        return 1, self.kv_heads, -(-tokens // BLOCK) * PAGE * (self.head_dim + 2)


@dataclass(frozen=True)
class StaticGraphs:
    """Graphs of fixed shapes, for accelerators: model.onnx takes one token, prefill.onnx `chunk`.

    `provider` is who runs them: a key of `edgekit.runtime.providers.PROVIDERS`. `cache` is the element type of keys and
    values, `hidden` what the mask takes away from a score to hide it. With `compiled`, *.qnn.onnx hold the same graphs
    compiled for one NPU: its name.
    """

    provider: Literal["qnn", "openvino"]
    chunk: int
    hidden: float
    cache: Literal["uint16", "float32"]
    compiled: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= 1 << 16 or not 0 < self.hidden < math.inf:
            raise ModelError(f"chunk and hidden must be above zero: got {self.chunk} and {self.hidden}")


@dataclass(frozen=True)
class DecoderSpec:
    """What the runtime must know of a decoder graph beyond the graph itself.

    `resident_bytes` is what the weights take in memory once they are loaded, `activation_bytes` what one token's
    activations take. `operators` says whose the graph's are: with "edgekit" the kernel library is registered where
    there is one, and the cache is float16, or int8 or int4 with a float16 scale for each row; "stock" graphs keep it in
    float32. `budget` is how many positions a token
    attends to exactly in sparse layers, unless the session asks for another number. `static` is there where the graphs
    have fixed shapes. `decode_threads` is how many threads read memory best on the device that it was exported for.
    `activations` are the bits that our operators round activations to for up to 64 tokens at a time.
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
    budget: int | None = None
    static: StaticGraphs | None = None
    decode_threads: int | None = None
    cache: Literal["float", "int8", "int4"] = "float"
    activations: Literal[8, 15] = 15

    def __post_init__(self) -> None:
        if self.cache != "float" and (self.operators != "edgekit" or self.static is not None):
            raise ModelError(f"a cache in {self.cache} must come with our operators: these are {self.operators}")
        if self.sparse != (self.budget is not None) or (self.budget is not None and self.budget < 1):
            raise ModelError(
                f"a budget of at least 1 must come with sparse layers, and with them alone: got {self.budget}"
            )
        sizes = {"vocabulary": self.vocabulary, "context_length": self.context_length, "layers": len(self.layers)}
        for index, layer in enumerate(self.layers):
            sizes |= {f"layers[{index}].kv_heads": layer.kv_heads, f"layers[{index}].head_dim": layer.head_dim}
        for name, size in sizes.items():
            if not 0 < size <= 1 << 24:
                raise ModelError(f"{name} must be from 1 to {1 << 24}: got {size}")
        if self.resident_bytes < 0 or self.activation_bytes < 0:
            raise ModelError(f"bytes must not be below 0: got {self.resident_bytes} and {self.activation_bytes}")
        if self.decode_threads is not None and not 1 <= self.decode_threads <= 1024:
            raise ModelError(f"decode_threads must be from 1 to 1024: got {self.decode_threads}")

    @property
    def cache_type(self) -> np.dtype[Any]:
        """The element type of keys and values."""
        if self.static is not None:
            return np.dtype(self.static.cache)
        if self.cache != "float":
            return np.dtype(np.int8 if self.cache == "int8" else np.uint8)
        return np.dtype(np.float16 if self.operators == "edgekit" else np.float32)

    @property
    def cache_name(self) -> str:
        """What keys and values are kept in, for people: float16, int4 and so on."""
        return str(self.cache_type) if self.cache == "float" else self.cache

    @property
    def sparse(self) -> bool:
        """Whether there are sparse layers."""
        return any(layer.sparse for layer in self.layers)

    def cache_parts(self, layer: LayerCache, tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of what the graph keeps of a layer for `tokens` tokens, which the third axis counts."""
        width = layer.head_dim // 2 if self.cache == "int4" else layer.head_dim
        rows = (1, layer.kv_heads, tokens, width)
        parts: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        parts["key"] = parts["value"] = (rows, self.cache_type)
        if self.cache != "float":
            parts["scales"] = ((1, 2 * layer.kv_heads, tokens), np.dtype(np.float16))
        if layer.sparse:
            parts["codes"] = (layer.code_shape(tokens), np.dtype(np.uint8))
            parts["means"] = (layer.mean_shape(tokens), np.dtype(np.uint8))
        return parts

    def layer_bytes(self, layer: LayerCache, tokens: int) -> int:
        """Bytes that a layer's cache of `tokens` tokens takes."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.cache_parts(layer, tokens).values())

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that the cache of `tokens` tokens takes: keys, values, and what stands beside them."""
        return sum(self.layer_bytes(layer, tokens) for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of cache that a further token takes, on average: summaries grow by whole blocks."""
        return self.cache_bytes(BLOCK) // BLOCK

    def to_json(self) -> str:
        facts = dataclasses.asdict(self)
        usual: dict[str, object] = {"static": None, "decode_threads": None, "cache": "float", "activations": 15}
        return json.dumps({k: v for k, v in facts.items() if k not in usual or v != usual[k]}, indent=1)


@dataclass(frozen=True)
class EncoderSpec:
    """What the runtime must know of an encoder graph: texts of up to `max_length` tokens become `dim` numbers each.

    `pooling` and `normalize` say how token states become a vector. `resident_bytes`, `activation_bytes` and `operators`
    mean what they do in `DecoderSpec`. `static` is there where the graph takes one text of `chunk` tokens, padded.
    """

    architecture: str
    target: str
    vocabulary: int
    max_length: int
    dim: int
    pooling: Literal["mean", "cls"]
    normalize: bool
    resident_bytes: int
    activation_bytes: int
    operators: Literal["stock", "edgekit"] = "stock"
    kind: Literal["encoder"] = "encoder"
    static: StaticGraphs | None = None

    def __post_init__(self) -> None:
        if self.static is not None and self.static.chunk != self.max_length:
            raise ModelError(f"a graph of {self.static.chunk} tokens must take texts of as many: got {self.max_length}")
        for name, size in {"vocabulary": self.vocabulary, "max_length": self.max_length, "dim": self.dim}.items():
            if not 0 < size <= 1 << 24:
                raise ModelError(f"{name} must be from 1 to {1 << 24}: got {size}")
        if self.resident_bytes < 0 or self.activation_bytes < 0:
            raise ModelError(f"bytes must not be below 0: got {self.resident_bytes} and {self.activation_bytes}")

    def to_json(self) -> str:
        facts = dataclasses.asdict(self)
        return json.dumps({k: v for k, v in facts.items() if k != "static" or v}, indent=1)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle of a decoder: every file is there and has its digest."""

    path: Path
    manifest: Manifest
    spec: DecoderSpec

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open and verify a bundle. Raises UserError when there is none at `path`, ModelError when it is not whole."""
        manifest, data = _open(path)
        if _is_encoder(data):
            raise UserError(f"{path} is an encoder, which makes embeddings and no text; use edgekit embed {path}")
        return cls(path, manifest, parse(DecoderSpec, data, where=str(path / SPEC), error=ModelError))

    def file(self, name: str) -> Path:
        """A file that the manifest lists. Raises ModelError when it does not: nothing unlisted is ever read."""
        if name not in self.manifest.files:
            raise ModelError(f"the bundle {self.path} must hold {name}; export it again")
        return inside(self.path, name)

    def has(self, name: str) -> bool:
        return name in self.manifest.files


@dataclass(frozen=True)
class EncoderBundle:
    """An opened bundle of an encoder: every file is there and has its digest."""

    path: Path
    manifest: Manifest
    spec: EncoderSpec

    @classmethod
    def open(cls, path: Path) -> EncoderBundle:
        """Open and verify a bundle. Raises UserError when there is none at `path` or it is a decoder's, ModelError when
        it is not whole."""
        manifest, data = _open(path)
        if not _is_encoder(data):
            raise UserError(f"{path} is a decoder, which makes text; embeddings need an encoder such as minilm-l6")
        return cls(path, manifest, parse(EncoderSpec, data, where=str(path / SPEC), error=ModelError))

    def file(self, name: str) -> Path:
        """A file that the manifest lists. Raises ModelError when it does not: nothing unlisted is ever read."""
        if name not in self.manifest.files:
            raise ModelError(f"the bundle {self.path} must hold {name}; export it again")
        return inside(self.path, name)


def is_encoder_bundle(path: Path) -> bool:
    """Whether the bundle at `path` is an encoder's. Raises as `Bundle.open` does."""
    return _is_encoder(_open(path)[1])


def _open(path: Path) -> tuple[Manifest, object]:
    """The manifest of a bundle whose files are whole, and what its runtime.json holds."""
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
        return manifest, json.loads((path / SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path / SPEC} must be readable JSON: {problem}") from problem


def _is_encoder(data: object) -> bool:
    return isinstance(data, dict) and data.get("kind") == "encoder"
