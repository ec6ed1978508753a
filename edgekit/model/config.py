"""The facts of a decoder's `config.json` that export and the NumPy forward need, for the Llama family.

Widths and head counts are not here: they are read from each layer's weights, since a compressed model's layers differ.
Not supported: mixtures of experts, sliding windows that differ by layer, weights that GPTQ, AWQ or FP8 quantised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from edgekit.errors import ModelError, UserError

RopeKind = Literal["default", "linear", "ntk", "yarn", "llama3"]
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding and how it is stretched by `factor`: see `edgekit.model.rope`.

    `low_freq_factor` and `high_freq_factor` are of llama3, `beta_fast`, `beta_slow` and `attention_factor` of yarn;
    `original_context` is how many positions the unstretched angles were trained for.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """What stays the same over all layers."""

    architecture: str
    hidden_size: int
    layers: int
    head_dim: int
    vocabulary: int
    context_length: int
    norm_eps: float
    rope: Rope
    tied: bool
    sliding_window: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read `config.json` as transformers writes it (4 or 5).

    Raises ModelError: an architecture that is not in `ARCHITECTURES`, a missing or impossible number, a rope scaling,
    an activation or a foreign quantisation that is not supported.
    """
    names = _list(config, "architectures")
    architecture = next((name for name in names if name in ARCHITECTURES), None)
    if architecture is None:
        raise ModelError(
            f"the architecture must be one of {', '.join(ARCHITECTURES)}: config.json says"
            f" {', '.join(map(str, names)) or 'nothing'}"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"the activation of a gated MLP must be silu: config.json says {activation!r}")
    if config.get("quantization_config"):
        raise ModelError(
            "the weights must be plain floats: config.json has a quantization_config; take the original model"
        )
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    if not config.get("head_dim") and hidden % heads:
        raise ModelError(f"config.json: without head_dim, hidden_size must divide by {heads} heads: got {hidden}")
    bos, eos = _token_ids(config, "bos_token_id"), _token_ids(config, "eos_token_id")
    return DecoderConfig(
        architecture=architecture,
        hidden_size=hidden,
        layers=_positive(config, "num_hidden_layers"),
        head_dim=_positive(config, "head_dim") if config.get("head_dim") else hidden // heads,
        vocabulary=_positive(config, "vocab_size"),
        context_length=_positive(config, "max_position_embeddings"),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_sliding_window(config),
        bos_id=bos[0] if bos else None,
        eos_ids=eos,
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {key} must be a positive integer: got {value!r}")
    return value


def _number(table: Mapping[str, Any], key: str, default: float) -> float:
    value = default if table.get(key) is None else table[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key} must be a positive number: got {value!r}")
    return float(value)


def _list(config: Mapping[str, Any], key: str) -> list[Any]:
    value = config.get(key) or []
    if not isinstance(value, list):
        raise ModelError(f"config.json: {key} must be a list: got {value!r}")
    return value


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids, which a config gives as one number, a list or null."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise ModelError(f"config.json: {key} must be one or more token ids: got {value!r}")
    return tuple(ids)


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps everything in `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise ModelError(f"config.json: rope_parameters must be a table: got {table!r}")
    theta = _number(table, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind == "dynamic":
        kind = "default"  # it stretches only beyond max_position_embeddings, where we do not go
    if kind not in get_args(RopeKind):
        known = ", ".join((*get_args(RopeKind), "dynamic"))
        raise ModelError(f"rope scaling must be one of {known}: config.json says {kind!r}")
    low, high = _number(table, "low_freq_factor", 1.0), _number(table, "high_freq_factor", 4.0)
    if low >= high:
        raise ModelError(f"config.json: low_freq_factor must be below high_freq_factor: got {low} and {high}")
    original = 0
    if kind == "llama3" or (kind == "yarn" and "original_max_position_embeddings" in table):
        original = _positive(table, "original_max_position_embeddings")
    elif kind == "yarn":
        original = _positive(config, "max_position_embeddings")
    factor = _number(table, "factor", 1.0)
    return Rope(
        theta=theta,
        kind=cast(RopeKind, kind),
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=original,
        beta_fast=_number(table, "beta_fast", 32.0),
        beta_slow=_number(table, "beta_slow", 1.0),
        attention_factor=_number(table, "attention_factor", _yarn_attention(table, factor) if kind == "yarn" else 1.0),
    )


def _yarn_attention(table: Mapping[str, Any], factor: float) -> float:
    """What yarn multiplies cosine and sine with, so that attention stays as sharp: Peng et al., equation 22."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if table.get("mscale") and table.get("mscale_all_dim"):
        return scale(_number(table, "mscale", 1.0)) / scale(_number(table, "mscale_all_dim", 1.0))
    return scale(1.0)


def stretched(config: Mapping[str, Any], kind: str, factor: float) -> dict[str, Any]:
    """`config.json` for `factor` times the context, by the rope scaling `kind`: linear, ntk or yarn.

    Raises UserError: another kind, a factor that is not above 1, or a model whose rope is stretched already.
    """
    if kind not in ("linear", "ntk", "yarn"):
        raise UserError(f"--rope-scaling must be linear, ntk or yarn and a factor, such as yarn:4: got {kind!r}")
    if not 1 < factor <= 64:
        raise UserError(f"the factor of --rope-scaling must be above 1 and at most 64: got {factor}")
    decoder = decoder_config(config)
    if decoder.rope.kind != "default":
        raise UserError(f"--rope-scaling needs a rope that is not stretched yet: the model's is {decoder.rope.kind}")
    table = {
        "rope_type": kind,
        "rope_theta": decoder.rope.theta,
        "factor": factor,
        "original_max_position_embeddings": decoder.context_length,
    }
    kept = {name: value for name, value in config.items() if name != "rope_scaling"}
    return {**kept, "rope_parameters": table, "max_position_embeddings": int(decoder.context_length * factor)}


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window that every layer attends in, or None. Qwen writes one but uses it only when it says so."""
    if not config.get("sliding_window"):
        return None
    window = _positive(config, "sliding_window")
    if not config.get("use_sliding_window", config.get("model_type") not in ("qwen2", "qwen3")):
        return None
    kinds = {str(kind) for kind in _list(config, "layer_types")}
    if kinds == {"full_attention"}:
        return None
    if len(kinds) > 1 or (not kinds and config.get("max_window_layers")):
        raise ModelError("sliding windows must be the same in all layers: config.json mixes full and sliding attention")
    return window
