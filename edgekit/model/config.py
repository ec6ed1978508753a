"""The facts of a decoder's `config.json` that export and the NumPy forward need, for the Llama family.

Widths and head counts are not here: they are read from each layer's weights, since a compressed model's layers differ.
Not supported: mixtures of experts, sliding windows that differ by layer, biases other than on q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from edgekit.errors import ModelError

RopeKind = Literal["default", "linear", "llama3"]
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `llama3` is the frequency-dependent scaling of Llama 3.1 (its `factor` and bands)."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


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

    Raises ModelError: an architecture that is not in `ARCHITECTURES`, a missing or impossible number, a rope scaling
    or activation that is not supported.
    """
    names = config.get("architectures") or []
    architecture = next((name for name in names if name in ARCHITECTURES), None)
    if architecture is None:
        raise ModelError(
            f"the architecture must be one of {', '.join(ARCHITECTURES)}: config.json says"
            f" {', '.join(map(str, names)) or 'nothing'}"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"the activation of a gated MLP must be silu: config.json says {activation!r}")
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    eos = config.get("eos_token_id")
    return DecoderConfig(
        architecture=architecture,
        hidden_size=hidden,
        layers=_positive(config, "num_hidden_layers"),
        head_dim=_positive(config, "head_dim") if config.get("head_dim") else hidden // heads,
        vocabulary=_positive(config, "vocab_size"),
        context_length=_positive(config, "max_position_embeddings"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_sliding_window(config),
        bos_id=config.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {key} must be a positive integer: got {value!r}")
    return value


def _rope(config: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps everything in `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(table.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"rope scaling must be default, linear or llama3: config.json says {kind!r}")
    return Rope(
        theta=theta,
        kind=cast(RopeKind, kind),
        factor=float(table.get("factor", 1.0)),
        low_freq_factor=float(table.get("low_freq_factor", 1.0)),
        high_freq_factor=float(table.get("high_freq_factor", 4.0)),
        original_context=int(table.get("original_max_position_embeddings", 0)),
    )


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window that every layer attends in, or None. Qwen writes one but uses it only when it says so."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    kinds = set(config.get("layer_types") or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise ModelError("sliding windows must be the same in all layers: config.json mixes full and sliding attention")
    return int(window)
