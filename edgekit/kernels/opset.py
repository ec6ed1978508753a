"""The one table of our operators: domain ai.edgekit, version 1.

Quantised weights come in tiles of sixteen rows (`edgekit.kernels.pack`): `codes`, `scales`, `zeros` and `minima`. Where
all rows share the zero point, `zeros` holds that one number, and where nothing is added, `minima`, `bias` or `residual`
hold a single zero. Scales are float16, and `steps` then a single one; or they are uint8 and minima int8, and `steps`
holds what a unit of them is worth in each row. So no input is ever absent (but steps, in models of before there were
any), and each operator means one formula. W is the (N, K) matrix of values scale * (code - zero) + minimum; the kernels
round what meets it to `activation_bits`, 15 or 8, in runs of up to 64 tokens, and to 8 in longer ones.

    QuantLinear            y = x W^T + bias + residual
    NormQuantLinear        y = n W^T + bias,                       n = RMSNorm(x) * norm
    GatedNormQuantLinear   y = silu(n Wg^T) * (n Wu^T),            the tiles of Wg and Wu take turns
    QuantEmbedding         y = W[ids]
    Attention              q and k rotated, k and v appended to the cache, then causal softmax(q k^T / sqrt(d)) v
    NormAttention          the same after RMSNorm of each q and k head
    ...Int8                the same over a cache in 8 bits: each row of k and v as whole numbers times a float16 scale
    ...Int4                the same in 4 bits, of rows that were multiplied by a Hadamard matrix (`edgekit.cache_rows`)
    HadamardSparseAttention, NormHadamardSparseAttention
                           the same for several tokens, and for one token an estimate of it: positions that small codes
                           of the keys find are attended exactly, the others by their estimated weights and the mean
                           values of their pages (`edgekit.kernels.sparse`). Without the kernels it is exact.
    ...Layer               a layer of a decoder: NormQuantLinear, one of the attention operators, QuantLinear (+ x),
                           GatedNormQuantLinear, QuantLinear (+ what the one before gave). Its inputs and attributes
                           are theirs, with the prefixes of `LAYER`; each reads what the one before made
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

DOMAIN = "ai.edgekit"
VERSION = 1

CacheType = Literal["float16", "int8", "int4"]  # of keys and values
CACHES: tuple[CacheType, ...] = get_args(CacheType)

_WEIGHTS = ("codes", "scales", "zeros", "minima")
_MATRIX = ("N", "K", "bits", "block")
_BITS = {"activation_bits": 15}
_HEADS = ("num_heads", "kv_num_heads", "head_dim", "local_window_size")
_SPARSE_HEADS = (*_HEADS, "sinks", "recent", "followers", "dense_below", "per_query_head", "adamas", "prefill_budget")


@dataclass(frozen=True)
class Op:
    """An operator's inputs, outputs and attributes, in order. All are required, but attributes with a default."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    defaults: dict[str, int] = field(default_factory=dict)


def attention_op(*, normed: bool, sparse: bool, cache: CacheType) -> str:
    """The name of the attention operator with RMSNorm of heads, sparse, over such a cache."""
    kind = "HadamardSparseAttention" if sparse else "Attention"
    return ("Norm" if normed else "") + kind + {"float16": "", "int8": "Int8", "int4": "Int4"}[cache]


def _attention(*, normed: bool, sparse: bool, cache: CacheType) -> Op:
    """One of the attention operators."""
    name = attention_op(normed=normed, sparse=sparse, cache=cache)
    kept = ("key", "value", *(("scales",) if cache != "float16" else ()), *(("codes", "means") if sparse else ()))
    inputs = ("qkv", *(f"past_{part}" for part in kept), "last", "cos", "sin")
    found = ("center", "encoder", "decoder", "budget") if sparse else ()
    norms = ("q_norm", "k_norm") if normed else ()
    attributes = (*(_SPARSE_HEADS if sparse else _HEADS), *(("epsilon",) if normed else ()))
    return Op(name, (*inputs, *found, *norms), ("y", *(f"present_{part}" for part in kept)), attributes)


_LINEAR = (
    Op("QuantLinear", ("x", *_WEIGHTS, "bias", "residual", "steps"), ("y",), _MATRIX, _BITS),
    Op("NormQuantLinear", ("x", "norm", *_WEIGHTS, "bias", "steps"), ("y",), (*_MATRIX, "epsilon"), _BITS),
    Op("GatedNormQuantLinear", ("x", "norm", *_WEIGHTS, "steps"), ("y",), (*_MATRIX, "epsilon"), _BITS),
    Op("QuantEmbedding", ("ids", *_WEIGHTS, "steps"), ("y",), _MATRIX),
)
_ATTENTION = tuple(
    _attention(normed=normed, sparse=sparse, cache=cache)
    for cache in CACHES
    for sparse in ((False, True) if cache != "int4" else (False,))
    for normed in (False, True)
)

# The operators of a layer, in order, and the prefixes that their inputs and attributes have there; "" is attention.
LAYER = {
    "qkv_": "NormQuantLinear", "": "Attention", "out_": "QuantLinear", "gate_": "GatedNormQuantLinear",
    "down_": "QuantLinear",
}  # fmt: skip
_PASSED = {"x", "qkv", "residual"}  # inputs that a layer's operators have of each other


def layer_parts(attention: str) -> dict[str, Op]:
    """The operators of a layer with this attention operator, by prefix."""
    known = {op.name: op for op in (*_LINEAR, *_ATTENTION)}
    return {prefix: known[name if prefix else attention] for prefix, name in LAYER.items()}


def layer_inputs(prefix: str, op: Op) -> list[str]:
    """What an operator of a layer takes from the layer's inputs, as they are called there."""
    return [f"{prefix}{name}" for name in op.inputs if name not in _PASSED]


def layer_attributes(prefix: str, op: Op) -> dict[str, str]:
    """An operator's attributes as the layer calls them; epsilon is the same for all."""
    return {name: name if name == "epsilon" else f"{prefix}{name}" for name in op.attributes}


def _layer(attention: Op) -> Op:
    parts = layer_parts(attention.name)
    inputs = [name for prefix, op in parts.items() for name in layer_inputs(prefix, op)]
    attributes = dict.fromkeys(name for prefix, op in parts.items() for name in layer_attributes(prefix, op).values())
    return Op(f"{attention.name}Layer", ("x", *inputs), attention.outputs, tuple(attributes), _BITS)


OPS = {op.name: op for op in (*_LINEAR, *_ATTENTION, *map(_layer, _ATTENTION))}
