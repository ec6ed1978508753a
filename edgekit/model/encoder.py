"""Encoders that make text embeddings, their weights under one set of names.

BERT, RoBERTa, XLM-RoBERTa and DistilBERT compute the same function and spell it differently. Here every one is seen as

    model.embed_tokens.{weight, positions, types, norm.weight, norm.bias}     types: absent in DistilBERT
    model.layers.N.self_attn.{q,k,v,o}_proj, .attention_norm, .mlp.{up,down}_proj, .output_norm    weight and bias

so that steps, which know decoders, round the same places. What an embedding does not use (pooler, heads of a task) is
left out. How token states become one vector is read from the sentence-transformers files beside the weights, and kept
in config.json under `edgekit_embedding`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from edgekit.checkpoint import Checkpoint, RenamedReader, read_json
from edgekit.errors import ModelError
from edgekit.folder import inside
from edgekit.model.encoder_config import ARCHITECTURES, EMBEDDING, Pooling, encoder_config

_BERT = (
    (r"embeddings\.word_embeddings\.weight", r"model.embed_tokens.weight"),
    (r"embeddings\.position_embeddings\.weight", r"model.embed_tokens.positions"),
    (r"embeddings\.token_type_embeddings\.weight", r"model.embed_tokens.types"),
    (r"embeddings\.LayerNorm\.(weight|bias)", r"model.embed_tokens.norm.\1"),
    (
        r"encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)(?:uery|ey|alue)\.(weight|bias)",
        r"model.layers.\1.self_attn.\2_proj.\3",
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(weight|bias)", r"model.layers.\1.attention_norm.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"model.layers.\1.mlp.down_proj.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(weight|bias)", r"model.layers.\1.output_norm.\2"),
)
_DISTILBERT = (
    *_BERT[:4],
    (r"transformer\.layer\.(\d+)\.attention\.(q|k|v)_lin\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"transformer\.layer\.(\d+)\.attention\.out_lin\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"transformer\.layer\.(\d+)\.sa_layer_norm\.(weight|bias)", r"model.layers.\1.attention_norm.\2"),
    (r"transformer\.layer\.(\d+)\.ffn\.lin1\.(weight|bias)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"transformer\.layer\.(\d+)\.ffn\.lin2\.(weight|bias)", r"model.layers.\1.mlp.down_proj.\2"),
    (r"transformer\.layer\.(\d+)\.output_layer_norm\.(weight|bias)", r"model.layers.\1.output_norm.\2"),
)
_NAMES = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTILBERT}
_PREFIX = re.compile(r"(bert|roberta|distilbert)\.")
_UNUSED = re.compile(
    r"pooler\.|cls\.|lm_head\.|classifier\.|pre_classifier\.|qa_outputs\.|vocab_(transform|layer_norm|projector)\."
    r"|embeddings\.(position|token_type)_ids$"
)


def open_encoder(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A view of an encoder's folder under the names above, with what its sentence-transformers files say.

    Raises ModelError: a weight that no part of the encoder reads, or pooling that is not supported.
    """
    family = ARCHITECTURES[encoder_config(checkpoint.config).architecture]
    seen: dict[str, str] = {}
    for stored in checkpoint.tensors.names():
        name = _canonical(stored, family)
        if name is not None:
            seen[name] = stored
    config = {**checkpoint.config, EMBEDDING: _sentence_transformers(folder)}
    encoder_config(config)
    return dataclasses.replace(checkpoint, tensors=RenamedReader(checkpoint.tensors, seen), config=config)


def _canonical(stored: str, family: str) -> str | None:
    """Our name of a stored tensor, or None for one that embeddings do not use."""
    plain = _PREFIX.sub("", stored, count=1) if _PREFIX.match(stored) else stored
    plain = plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if _UNUSED.match(plain):
        return None
    for pattern, name in _NAMES[family]:
        match = re.fullmatch(pattern, plain)
        if match:
            return match.expand(name)
    raise ModelError(f"every weight must have a place in the encoder: {stored!r:.100} has none in the family {family}")


# --- what sentence-transformers says ----------------------------------------------------------------------------------


def _sentence_transformers(folder: Path) -> dict[str, object]:
    """Pooling, normalisation and the longest text of a folder; without its files the plain mean of the states."""
    found: dict[str, object] = {"pooling": "mean", "normalize": False, "max_length": 0}
    if (folder / "sentence_bert_config.json").is_file():
        longest = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        if longest is not None:
            found["max_length"] = longest
    for kind, path in _modules(folder):
        if kind == "Pooling":
            found["pooling"] = _pooling(read_json(inside(folder, f"{path}/config.json")), f"{path}/config.json")
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind != "Transformer":
            raise ModelError(f"modules.json: a module must be Transformer, Pooling or Normalize: got {kind!r:.80}")
    return found


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """(kind, path) of each module that modules.json lists, which is a list and no object."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path} must be readable JSON: {problem}") from problem
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ModelError(f"{path} must hold a list of modules")
    for row in rows:
        yield str(row.get("type", "")).rpartition(".")[2], str(row.get("path", ""))


def _pooling(config: Mapping[str, Any], where: str) -> Pooling:
    """sentence-transformers 5 writes `pooling_mode`; before, a flag for each mode."""
    flags = {key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on}
    named = config.get("pooling_mode")
    chosen = {named} if isinstance(named, str) else {"cls" if f == "cls_token" else f for f in flags}
    chosen = {"mean" if mode == "mean_tokens" else mode for mode in chosen}
    if len(chosen) != 1 or not chosen <= {"mean", "cls"}:
        raise ModelError(f"pooling must be mean or cls: {where} says {', '.join(sorted(chosen)) or 'nothing'}")
    return cast(Pooling, chosen.pop())
