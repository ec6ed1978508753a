"""The facts of an encoder's `config.json`, and what its embeddings are: the BERT family of `ARCHITECTURES`.

Not supported: relative positions (MPNet, DeBERTa), rotary ones (ModernBERT), decoders as encoders, any activation but
gelu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from edgekit.errors import ModelError
from edgekit.model.config import DecoderConfig, Rope, decoder_config

Pooling = Literal["mean", "cls"]
EMBEDDING = "edgekit_embedding"

FAMILIES = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta", "DistilBert": "distilbert"}
TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
ARCHITECTURES = {name + task: family for name, family in FAMILIES.items() for task in (*TASKS, "ForPreTraining")}


@dataclass(frozen=True)
class EncoderConfig:
    """Facts of an encoder. `position_offset`: the row of the position table that the first token takes.

    `max_length`: tokens of a text, special ones included; what is longer has to be cut.
    """

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    positions: int
    position_offset: int
    norm_eps: float
    pooling: Pooling
    normalize: bool
    max_length: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder known here."""
    return _architecture(config) is not None


def encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Read `config.json` as transformers writes it. Raises ModelError: what is missing, impossible or not supported."""
    architecture = _architecture(config)
    if architecture is None:
        raise ModelError(
            f"the architecture must be one of {', '.join(sorted(ARCHITECTURES))}: config.json says"
            f" {config.get('architectures') or 'nothing'!r:.100}"
        )
    family = ARCHITECTURES[architecture]
    other = family == "distilbert"
    activation = config.get("activation" if other else "hidden_act", "gelu")
    if activation != "gelu":
        raise ModelError(f"the activation of an encoder must be gelu: config.json says {activation!r}")
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ModelError(f"the positions of an encoder must be absolute: config.json says {kind!r}")
    if config.get("is_decoder"):
        raise ModelError("an encoder must see the whole text: config.json says is_decoder")
    hidden, heads = _count(config, "dim" if other else "hidden_size"), _count(config, _key(other, "heads"))
    if hidden % heads:
        raise ModelError(f"config.json: the hidden size {hidden} must divide by {heads} heads")
    positions = _count(config, "max_position_embeddings")
    offset = _pad(config) + 1 if family == "roberta" else 0
    pooling, normalize, longest = _embedding(config)
    if positions <= offset:
        raise ModelError(f"config.json: max_position_embeddings must be above {offset}: got {positions}")
    return EncoderConfig(
        architecture=architecture,
        hidden_size=hidden,
        layers=_count(config, _key(other, "layers")),
        heads=heads,
        mlp=_count(config, "hidden_dim" if other else "intermediate_size"),
        vocabulary=_count(config, "vocab_size"),
        positions=positions,
        position_offset=offset,
        norm_eps=1e-12 if other else _epsilon(config),
        pooling=pooling,
        normalize=normalize,
        max_length=min(longest or positions, positions - offset),
    )


def step_facts(config: Mapping[str, Any]) -> DecoderConfig:
    """The facts that steps are told of a model: a decoder's, or an encoder's in their place.

    An encoder has no rotation, no head and no end token; its steps work on weights alone and look at none of these.
    Raises ModelError for what is neither.
    """
    if not is_encoder(config):
        return decoder_config(config)
    encoder = encoder_config(config)
    return DecoderConfig(
        architecture=encoder.architecture,
        hidden_size=encoder.hidden_size,
        layers=encoder.layers,
        head_dim=encoder.head_dim,
        vocabulary=encoder.vocabulary,
        context_length=encoder.max_length,
        norm_eps=encoder.norm_eps,
        rope=Rope(10000.0),
        tied=False,
        sliding_window=None,
        bos_id=None,
        eos_ids=(),
    )


def _embedding(config: Mapping[str, Any]) -> tuple[Pooling, bool, int]:
    table = config.get(EMBEDDING) or {}
    if not isinstance(table, Mapping):
        raise ModelError(f"config.json: {EMBEDDING} must be a table: got {table!r:.60}")
    pooling, normalize, longest = (
        table.get("pooling", "mean"),
        table.get("normalize", False),
        table.get("max_length", 0),
    )
    if pooling not in ("mean", "cls") or type(normalize) is not bool or type(longest) is not int or longest < 0:
        raise ModelError(
            f"{EMBEDDING} must hold pooling (mean or cls), normalize and max_length (0: as the model):"
            f" got {pooling!r:.40}, {normalize!r:.40}, {longest!r:.40}"
        )
    return cast(Pooling, pooling), normalize, longest


# --- the entries of config.json ---------------------------------------------------------------------------------------


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return next((name for name in names if name in ARCHITECTURES), None) if isinstance(names, list) else None


def _key(other: bool, what: Literal["heads", "layers"]) -> str:
    return f"n_{what}" if other else {"heads": "num_attention_heads", "layers": "num_hidden_layers"}[what]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 24:
        raise ModelError(f"config.json: {key} must be a positive integer: got {value!r:.60}")
    return value


def _pad(config: Mapping[str, Any]) -> int:
    value = config.get("pad_token_id", 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"config.json: pad_token_id must be a token id: got {value!r:.60}")
    return value


def _epsilon(config: Mapping[str, Any]) -> float:
    value = config.get("layer_norm_eps", 1e-12)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ModelError(f"config.json: layer_norm_eps must be from 0 to 1: got {value!r:.60}")
    return float(value)
