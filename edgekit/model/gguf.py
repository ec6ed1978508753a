"""A GGUF file as a checkpoint: transformers' names and shapes, rows in transformers' order, values as float32.

llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head where transformers rotates halves (i, i + d/2). Its
converter therefore reorders the rows of q and k in files of architecture `llama`; reading undoes it, exactly:

    row(h, i + j * d/2) = stored row(h, 2i + j),        i < d/2, j in {0, 1}.

qwen2 and qwen3 files keep transformers' order. A model without `output.weight` has its head tied to the embedding.

Not supported: mixtures of experts, partial rotary embedding, rope scaling other than linear and Llama 3's, and types
outside `TYPES`. Source: GGUF specification (ggml, docs/gguf.md); Llama 3's rope: transformers, `modeling_rope_utils`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgekit import folder
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.manifest import SourceRecord
from edgekit.model.config import Rope
from edgekit.model.gguf_codes import read_codes
from edgekit.model.gguf_file import GgufFile, read_gguf
from edgekit.model.gguf_tokenizer import end_token_ids, tokenizer_assets
from edgekit.model.rope import frequencies
from edgekit.weight import Quantized

Number = TypeVar("Number", bound=np.generic)

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def open_gguf(path: Path, *, digest: str | None = None) -> Checkpoint:
    """Open a GGUF file; tensors are read when asked for. `digest` is the file's sha256 where it is known already.

    Raises ModelError: a broken file, an architecture, type or tokenizer that is not supported, or tensors whose names
    or shapes disagree with the metadata.
    """
    file = read_gguf(path)
    config = model_config(file)
    names = {_full_name(name): name for name in _check_tensors(file, config)}
    assets = tokenizer_assets(file)
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    return Checkpoint(
        config=config,
        tensors=GgufReader(file, names, heads if file.require("general.architecture", str) == "llama" else None),
        source=SourceRecord(
            name=path.name,
            kind="gguf",
            digest=digest or folder.digest(path),
            license=file.get("general.license", str) or "unknown",
        ),
        assets=assets,
    )


@dataclass(frozen=True)
class GgufReader:
    """The tensors of a GGUF file by transformers' names.

    `stored` maps those to the file's; `interleaved` is (query heads, key heads) where q and k must be reordered.
    """

    file: GgufFile
    stored: dict[str, str]
    interleaved: tuple[int, int] | None

    def names(self) -> Sequence[str]:
        return sorted(self.stored)

    def files(self) -> set[Path]:
        return {self.file.path}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self.stored[name]].shape

    def kind(self, name: str) -> str:
        """The file's type of a tensor, such as `Q4_K`."""
        return str(self.file.tensors[self.stored[name]].type.name)

    def codes(self, name: str) -> Quantized:
        """A matrix of one of the types in `gguf_codes.FORMATS` without rounding."""
        stored = self.stored[name]
        raw: NDArray[np.uint8] = self.file.data(stored)
        heads = self._heads(stored)
        order = None if heads is None else halves(np.arange(len(raw)), heads)
        return read_codes(raw, self.kind(name), order)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as float32, a new array."""
        stored = self.stored[name]
        tensor = self.file.tensors[stored]
        values: NDArray[np.float32] = dequantize(self.file.data(stored), tensor.type)
        heads = self._heads(stored)
        if heads is not None:
            values = halves(values, heads)
        return np.array(values) if tensor.type.name == "F32" else values  # F32 would still be a view of the file

    def _heads(self, stored: str) -> int | None:
        """How many heads' rows are interleaved in a tensor of the file; None where none are."""
        if self.interleaved and ".attn_q." in stored:
            return self.interleaved[0]
        return self.interleaved[1] if self.interleaved and ".attn_k." in stored else None


def halves(values: NDArray[Number], heads: int) -> NDArray[Number]:
    """Undo the interleaving of the rows of each head: (heads * d, ...) to the same shape."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


# --- the config -------------------------------------------------------------------------------------------------------


def model_config(file: GgufFile) -> dict[str, Any]:
    """The metadata as transformers 5 would write them into config.json. Raises ModelError for what is not supported."""
    family = file.require("general.architecture", str)
    if family not in FAMILIES:
        raise ModelError(
            f"{file.path}: the architecture of a GGUF file must be one of {', '.join(FAMILIES)}: got {family!r:.40};"
            " pass the model's transformers folder if it has one"
        )
    if file.get(f"{family}.expert_count", int):
        raise ModelError(f"{file.path}: mixtures of experts are not supported; choose a dense model")
    hidden, heads = _size(file, "embedding_length"), _size(file, "attention.head_count")
    kv_heads = _size(file, "attention.head_count_kv", default=heads)
    head_dim = _size(file, "attention.key_length", default=hidden // heads or 1)
    if heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"{file.path}: query heads must be a multiple of key heads, and their size even:"
            f" got {heads} and {kv_heads} heads of {head_dim}"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(file, key, default=head_dim) != head_dim:
            raise ModelError(f"{file.path}: {key} must equal the head size {head_dim}: got {_size(file, key)}")
    window = file.get(f"{family}.attention.sliding_window", int) if family == "llama" else None
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if window else FAMILIES[family]],
        "model_type": "mistral" if window else family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _size(file, "feed_forward_length"),
        "num_hidden_layers": _size(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": len(file.require("tokenizer.ggml.tokens", list)),
        "max_position_embeddings": _size(file, "context_length"),
        "rms_norm_eps": _shortest(file.require(f"{family}.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": _rope(file, family, head_dim),
        "attention_bias": family == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": end_token_ids(file),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id", int),
        "dtype": "float32",
    }
    return {**config, "sliding_window": window} if window else config


def _size(file: GgufFile, key: str, *, default: int | None = None) -> int:
    """A positive integer under the architecture's prefix."""
    full = f"{file.require('general.architecture', str)}.{key}"
    value = file.require(full, int) if default is None else file.get(full, int)
    value = default if value is None else value
    if value is None or value <= 0:
        raise ModelError(f"{file.path}: {full} must be positive: got {value}")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was 1e-05 before it was stored."""
    return float(str(np.float32(value)))


def _rope(file: GgufFile, family: str, head_dim: int) -> dict[str, Any]:
    theta = _shortest(file.get(f"{family}.rope.freq_base", float) or 10000.0)
    kind = file.get(f"{family}.rope.scaling.type", str) or "none"
    factor = file.get(f"{family}.rope.scaling.factor", float) or file.get(f"{family}.rope.scale_linear", float) or 1.0
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: rope scaling must be none or linear: got {kind!r:.40}; choose another model")
    if ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    if factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": _shortest(factor)}


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from the d/2 numbers by which a file divides the frequencies.

    The largest is `factor`; the bands are those of every published model, accepted when they give the same numbers
    to a relative error of 1e-4.
    """
    stored = np.array(dequantize(file.data(ROPE_FACTORS), file.tensors[ROPE_FACTORS].type), np.float64).reshape(-1)
    if np.all(stored == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(np.round(stored.max(), 4))
    low, high, context = LLAMA3_BANDS.values()
    scaled = Rope(theta, "llama3", factor, low, high, int(context))
    expected = frequencies(Rope(theta), head_dim) / frequencies(scaled, head_dim)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4, atol=0.0):
        raise ModelError(
            f"{file.path}: {ROPE_FACTORS} must be the rope scaling of Llama 3 ({LLAMA3_BANDS}): it is another one;"
            " pass the model's transformers folder"
        )
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_BANDS}


# --- the tensors ------------------------------------------------------------------------------------------------------


def _check_tensors(file: GgufFile, config: dict[str, Any]) -> set[str]:
    """The names of the model's tensors; each is there, of a type that can be read and of the shape that `config` asks.

    Raises ModelError naming the first that is not, and any tensor that the architecture does not have.
    """
    known: set[str] = set()
    for name, shape, required in _wanted(config):
        tensor = file.tensors.get(name)
        if tensor is None and required:
            raise ModelError(f"{file.path}: the tensor {name} is missing; the file is incomplete, fetch it again")
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ModelError(
                f"{file.path}: tensor {name} must have the shape {shape} by the file's metadata: got {tensor.shape}"
            )
        if tensor.type.name not in TYPES:
            raise ModelError(
                f"{file.path}: tensor {name} has the type {tensor.type.name}, readable are {', '.join(TYPES)};"
                " take a file quantised as one of these"
            )
        known.add(name)
    unknown = sorted(file.tensors.keys() - known - {ROPE_FACTORS})
    if unknown:
        raise ModelError(
            f"{file.path}: a {config['model_type']} model has no tensor {unknown[0]!r:.80}"
            f" ({len(unknown)} such); pass the model's transformers folder"
        )
    return known


def _wanted(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it must be there, for each tensor that the model can have."""
    hidden, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    if config["model_type"] == "qwen3":
        shapes |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    yield "token_embd.weight", (config["vocab_size"], hidden), True
    yield "output_norm.weight", (hidden,), True
    yield "output.weight", (config["vocab_size"], hidden), False
    for layer in range(config["num_hidden_layers"]):
        for module, shape in shapes.items():
            yield f"blk.{layer}.{module}.weight", shape, True
        for module in ("attn_q", "attn_k", "attn_v", "attn_output"):
            needed = config["model_type"] == "qwen2" and module != "attn_output"
            yield f"blk.{layer}.{module}.bias", shapes[module][:1], needed


def _full_name(name: str) -> str:
    """`blk.0.ffn_up.weight` -> `model.layers.0.mlp.up_proj.weight`."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if layer:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    module, _, leaf = name.rpartition(".")
    return f"{TOP_NAMES[module]}.{leaf}"
