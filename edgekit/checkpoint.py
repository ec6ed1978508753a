"""The checkpoint: a model as a folder of plain files, read lazily as NumPy arrays.

    config.json             as transformers writes it
    model-0000K-of-N.safetensors + model.safetensors.index.json
    tokenizer files         byte for byte from the source
    structure.json          module path -> what replaced its nn.Linear, for modules that changed
    edgekit.json            the manifest

A transformers folder and a GGUF file open as the same thing, only without structure and manifest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors relies on
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.manifest import Manifest, SourceRecord
from edgekit.model.config import DecoderConfig, decoder_config
from edgekit.schema import parse
from edgekit.weight import Dense, Factored, Floats, Quantized, Weight, stored_parts

INDEX = "model.safetensors.index.json"
STRUCTURE = "structure.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class TensorReader(Protocol):
    """Named tensors that are read one at a time."""

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""

    def files(self) -> set[Path]:
        """The files that hold them; none where they are in memory."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def read(self, name: str) -> NDArray[Any]:
        """A tensor: integers and float16 as stored, every other float or GGUF type as float32."""


@dataclass(frozen=True)
class RenamedReader:
    """A TensorReader whose `seen` names stand for other names of `stored`."""

    stored: TensorReader
    seen: Mapping[str, str]

    def names(self) -> Sequence[str]:
        return sorted(self.seen)

    def files(self) -> set[Path]:
        return self.stored.files()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored.shape(self.seen[name])

    def read(self, name: str) -> NDArray[Any]:
        return self.stored.read(self.seen[name])


@dataclass(frozen=True)
class Entry:
    """What `structure.json` says of one module, a matrix of `shape` (out, in).

    quantized: codes of `bits` bits in blocks. factored: a product over `sites` (out, in) of matrices that are stored as
    the modules `MODULE.factors.0` and so on, quantised or not.
    """

    kind: Literal["quantized", "factored"]
    bits: int = 0
    block: int = 0
    shape: tuple[int, ...] = ()
    sites: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        factored = self.kind == "factored"
        if len(self.shape) != 2 or min(self.shape) <= 0 or (self.block <= 0 and not factored):
            raise ModelError(
                f"a matrix must have (out, in) and a block size, all positive: got {self.shape}, {self.block}"
            )
        if factored and (len(self.sites) < 2 or any(len(site) != 2 or min(site) < 1 for site in self.sites)):
            raise ModelError(f"a factored matrix must have two or more sites (out, in): got {self.sites}")

    def to_json(self) -> dict[str, object]:
        """The entry as it is written: what its kind does not have is left out."""
        unused = ("bits", "block") if self.kind == "factored" else ("sites",)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}


@dataclass(frozen=True)
class Block:
    """The unit that steps work on: one decoder layer, or what stands before ("embedding") or after them ("final").

    `matrices` maps a module path to its weight, `vectors` a tensor name to norms and biases, (n,) float32.
    """

    name: str
    matrices: dict[str, Weight]
    vectors: dict[str, Floats] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(w.size_bytes for w in self.matrices.values()) + sum(v.nbytes for v in self.vectors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be read. `assets` are the tokenizer files, name -> bytes."""

    config: dict[str, Any]
    tensors: TensorReader
    source: SourceRecord
    assets: Mapping[str, bytes]
    structure: Mapping[str, Entry] = field(default_factory=dict)
    manifest: Manifest | None = None

    @cached_property
    def decoder(self) -> DecoderConfig:
        """The config as export needs it. Raises ModelError for what is no supported decoder."""
        return decoder_config(self.config)

    @cached_property
    def blocks(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Block name -> (module paths of its matrices, tensor names of its vectors), in the order of the model."""
        found: dict[str, tuple[list[str], list[str]]] = {}
        for name in self.tensors.names():
            module, _, leaf = name.rpartition(".")
            matrices, vectors = found.setdefault(block_of(name), ([], []))
            if leaf in ("scales", "zeros", "minima", "steps") and module in self.structure:
                continue
            if leaf == "codes" or (leaf == "weight" and len(self.tensors.shape(name)) == 2):
                owner = module.rpartition(".factors.")[0]
                module = owner if owner in self.structure else module
                if module not in matrices[-1:]:
                    matrices.append(module)
            else:
                vectors.append(name)
        ordered = sorted(found, key=_block_order)
        return {name: (tuple(sorted(found[name][0])), tuple(sorted(found[name][1]))) for name in ordered}

    def has(self, name: str) -> bool:
        """Whether a tensor, or the matrix of a module, of this name is there."""
        return name in self._names or name + ".weight" in self._names or name in self.structure

    def weight(self, module: str) -> Weight:
        """The matrix of a module such as `model.layers.0.mlp.up_proj`. Raises ModelError when it is absent."""
        entry = self.structure.get(module)
        if entry is not None and entry.kind == "factored":
            return self._factored(module, entry)
        return self._plain(module)

    def _factored(self, module: str, entry: Entry) -> Factored:
        sites = tuple((site[0], site[1]) for site in entry.sites)
        try:
            found = Factored(tuple(self._plain(part) for part in self.parts(module)), sites)
        except ModelError as problem:
            raise ModelError(f"{module}: {problem}") from problem
        if found.shape != entry.shape:
            raise ModelError(f"{STRUCTURE} must agree with the weights: {module} is {found.shape}, not {entry.shape}")
        return found

    def _plain(self, module: str) -> Dense | Quantized:
        entry = self.structure.get(module)
        if entry is None:
            self.shape(module)  # refuses what is no matrix
            return Dense(self.vector(module + ".weight"))
        if entry.kind == "factored":
            raise ModelError(f"{STRUCTURE} must not factor factors: {module}")
        zeros, minima, steps = (
            self._read(name) if name in self._names else None
            for name in (f"{module}.{leaf}" for leaf in ("zeros", "minima", "steps"))
        )
        quantized = Quantized(
            codes=self._read(module + ".codes"),
            scales=self._read(module + ".scales"),
            zeros=zeros,
            minima=minima,
            steps=steps,
            bits=entry.bits,
            block=entry.block,
            columns=entry.shape[1],
        )
        if quantized.shape != entry.shape:
            raise ModelError(
                f"{STRUCTURE} must agree with the weights: {module} is {quantized.shape}, not {entry.shape}"
            )
        return quantized

    def parts(self, module: str) -> tuple[str, ...]:
        """The names under which a module's matrices are stored: its own, or those of its factors."""
        entry = self.structure.get(module)
        if entry is None or entry.kind != "factored":
            return (module,)
        return tuple(f"{module}.factors.{index}" for index in range(len(entry.sites)))

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module's matrix, without reading it."""
        entry = self.structure.get(module)
        if entry is None and module + ".weight" not in self._names:
            raise ModelError(f"the model must have {module}: its weights lack it")
        shape = entry.shape if entry else self.tensors.shape(module + ".weight")
        if len(shape) != 2:
            raise ModelError(f"a matrix must have two dimensions: {module}.weight has shape {shape}")
        return shape[0], shape[1]

    def vector(self, name: str) -> Floats:
        """A float tensor by its full name, float32. Raises ModelError when it is absent."""
        return self._read(name).astype(np.float32, copy=False)

    def read_block(self, name: str) -> Block:
        """Read one block of `blocks` whole."""
        matrices, vectors = self.blocks[name]
        return Block(
            name, {path: self.weight(path) for path in matrices}, {path: self.vector(path) for path in vectors}
        )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.tensors.names())

    def _read(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise ModelError(f"the model must have {name}: its weights lack it")
        return self.tensors.read(name)


def block_of(name: str) -> str:
    """The block that a tensor or module belongs to: `layers.7`, `embedding` or `final`."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer:
        return f"layers.{layer[1]}"
    return "embedding" if "embed_tokens" in name else "final"


def _block_order(name: str) -> tuple[int, int]:
    if name.startswith("layers."):
        return 1, int(name.removeprefix("layers."))
    return (0, 0) if name == "embedding" else (2, 0)


# --- reading a folder -------------------------------------------------------------------------------------------------


class SafetensorsReader:
    """The tensors of a folder's safetensors file, or of its shards by their index."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, Any] = {}
        single = folder / "model.safetensors"
        if (folder / INDEX).exists():
            weight_map = read_json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{folder / INDEX} must map tensor names to files: it has no weight_map")
            self._where = {name: _shard(folder, shard) for name, shard in weight_map.items()}
        elif single.exists():
            self._where = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise ModelError(f"a model folder must hold model.safetensors or {INDEX}: {folder} has neither")
        for name, path in self._where.items():
            if name not in self._open(path).keys():  # noqa: SIM118  a safetensors handle is no mapping
                raise ModelError(f"{path} must hold the tensor {name}, which {INDEX} promises")

    def names(self) -> Sequence[str]:
        return sorted(self._where)

    def files(self) -> set[Path]:
        return set(self._where.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._where[name]).get_slice(name).get_shape())

    def read(self, name: str) -> NDArray[Any]:
        try:
            values: NDArray[Any] = self._open(self._where[name]).get_tensor(name)
        except (safetensors.SafetensorError, TypeError) as problem:
            raise ModelError(f"tensor {name} of {self._where[name]} cannot be read: {problem}") from problem
        plain = values.dtype.kind in "iub" or values.dtype == np.float16  # codes and their scales stay as they are
        return values if plain else values.astype(np.float32, copy=False)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as problem:
                raise ModelError(f"{path} must be a whole safetensors file: {problem}; fetch it again") from problem
        return self._files[path]


def _shard(folder: Path, name: object) -> Path:
    """A shard of `folder`, by its plain file name. It may be a link: the Hub's cache keeps files elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ModelError(f"{folder / INDEX} must name files of its own folder: got {name!r:.80}")
    return folder / name


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder that `edgekit compress` wrote; every digest is verified. Raises ModelError when it is not whole."""
    manifest = Manifest.load(folder)
    if manifest.kind != "checkpoint":
        raise ModelError(f"{folder} is a {manifest.kind}, not a checkpoint; name the folder that compress wrote")
    structure = {
        path: parse(Entry, entry, where=f"{folder / STRUCTURE}: {path}", error=ModelError)
        for path, entry in read_json(folder / STRUCTURE).items()
    }
    return Checkpoint(
        config=read_json(folder / "config.json"),
        tensors=SafetensorsReader(folder),
        source=manifest.source,
        assets=read_assets(folder),
        structure=structure,
        manifest=manifest,
    )


def refuse_overlap(checkpoint: Checkpoint, output: Path) -> None:
    """Raise UserError when writing the folder `output` would touch what the checkpoint is read from."""
    target = Path(os.path.realpath(output))
    for file in checkpoint.tensors.files():
        place = file.parent if file.suffix == ".safetensors" else file  # a model is its folder
        model = Path(os.path.realpath(place))
        if target.is_relative_to(model) or model.is_relative_to(target):
            raise UserError(f"the output must lie apart from the source: {output} and {place}; choose another name")


def read_assets(folder: Path) -> dict[str, bytes]:
    """The tokenizer files that `folder` has."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path} must be readable JSON: {problem}") from problem
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return data


# --- writing ----------------------------------------------------------------------------------------------------------


def write_block(path: Path, block: Block) -> dict[str, Entry]:
    """Write a block as one safetensors file, the same bytes for the same block; returns its structure entries."""
    tensors: dict[str, NDArray[Any]] = dict(block.vectors)
    entries: dict[str, Entry] = {}
    for module, weight in _stored_matrices(block, entries):
        if isinstance(weight, Dense):
            tensors[module + ".weight"] = weight.values
            continue
        tensors[module + ".codes"] = weight.codes
        tensors[module + ".scales"] = weight.scales
        for leaf, part in (("zeros", weight.zeros), ("minima", weight.minima), ("steps", weight.steps)):
            if part is not None:
                tensors[f"{module}.{leaf}"] = part
        entries[module] = Entry("quantized", weight.bits, weight.block, weight.shape)
    safetensors.numpy.save_file({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, path)
    path.chmod(0o644)  # the library makes it readable for its owner only
    return entries


def _stored_matrices(block: Block, entries: dict[str, Entry]) -> Iterator[tuple[str, Dense | Quantized]]:
    """Each matrix by its stored name; factored ones, whose entries are added, as their factors."""
    for module, weight in block.matrices.items():
        if isinstance(weight, Factored):
            entries[module] = Entry("factored", shape=weight.shape, sites=weight.sites)
        yield from stored_parts(module, weight)


def write_frame(
    folder: Path, checkpoint: Checkpoint, *, shards: Mapping[str, Sequence[str]], structure: Mapping[str, Entry]
) -> list[str]:
    """Write what stands around the shards (config, index, structure, tokenizer). Returns all file names.

    `shards` maps each shard's file name to the tensors it holds.
    """
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    size = sum((folder / shard).stat().st_size for shard in shards)
    texts = {
        "config.json": checkpoint.config,
        INDEX: {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
        STRUCTURE: {path: entry.to_json() for path, entry in sorted(structure.items())},
    }
    for name, data in texts.items():
        (folder / name).write_text(json.dumps(data, indent=1, ensure_ascii=False))
    for name, content in checkpoint.assets.items():
        (folder / name).write_bytes(content)
    return [*shards, *texts, *checkpoint.assets]
