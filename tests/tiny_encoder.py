"""Tiny random encoders for tests, as transformers folders with sentence-transformers files; written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from tiny import CORPUS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

BERT = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "o": "attention.output.dense", "norm1": "attention.output.LayerNorm", "up": "intermediate.dense",
    "down": "output.dense", "norm2": "output.LayerNorm", "layer": "encoder.layer",
}  # fmt: skip
DISTILBERT = {
    "q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin", "o": "attention.out_lin",
    "norm1": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2", "norm2": "output_layer_norm",
    "layer": "transformer.layer",
}  # fmt: skip


def tiny_encoder(
    path: Path,
    *,
    architecture: str = "BertModel",
    layers: int = 2,
    hidden: int = 64,
    mlp: int = 96,
    heads: int = 4,
    longest: int = 24,
    pooling: str = "mean_tokens",
    normalize: bool = True,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32] | None] | None = None,
) -> Path:
    """Write a folder and return it. `config` overrides entries; `tensors` adds tensors, or takes away those of None."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = word_pieces()
    vocabulary = tokenizer.get_vocab_size()
    written = encoder_config(architecture, layers=layers, hidden=hidden, mlp=mlp, heads=heads, vocabulary=vocabulary)
    stored = {**encoder_tensors(written), **(tensors or {})}
    kept = {name: values for name, values in stored.items() if values is not None}
    safetensors.numpy.save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    (path / "1_Pooling").mkdir(exist_ok=True)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    rows = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    files: dict[str, object] = {
        "config.json": {**written, **(config or {})},
        "modules.json": rows,
        "1_Pooling/config.json": {"word_embedding_dimension": hidden, f"pooling_mode_{pooling}": True},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=1))
    tokenizer.enable_truncation(8)  # as published files have it: it must not cut in silence
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def encoder_config(
    architecture: str, *, layers: int, hidden: int, mlp: int, heads: int, vocabulary: int
) -> dict[str, Any]:
    common = {"architectures": [architecture], "vocab_size": vocabulary, "max_position_embeddings": 40}
    if architecture.startswith("DistilBert"):
        sizes = {"dim": hidden, "hidden_dim": mlp, "n_layers": layers, "n_heads": heads}
        return {**common, **sizes, "activation": "gelu", "model_type": "distilbert", "pad_token_id": 0}
    roberta = "Roberta" in architecture
    return {
        **common,
        "model_type": "roberta" if roberta else "bert",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 1 if roberta else 2,
        "pad_token_id": 1 if roberta else 0,
    }


def encoder_tensors(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Tensors by transformers' names."""
    rng = np.random.default_rng(seed)
    distil = config["model_type"] == "distilbert"
    names, hidden = (DISTILBERT, config["dim"]) if distil else (BERT, config["hidden_size"])
    mlp, layers = (
        config[k] for k in (("hidden_dim", "n_layers") if distil else ("intermediate_size", "num_hidden_layers"))
    )
    tensors: dict[str, NDArray[np.float32]] = {}

    def add(module: str, *shape: int) -> None:
        scale = 1 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1
        tensors[module] = (rng.standard_normal(shape) * scale).astype(np.float32)

    def norm(module: str) -> None:
        add(f"{module}.weight", hidden)
        tensors[f"{module}.weight"] += 1
        add(f"{module}.bias", hidden)

    add("embeddings.word_embeddings.weight", config["vocab_size"], hidden)
    add("embeddings.position_embeddings.weight", config["max_position_embeddings"], hidden)
    if not distil:
        add("embeddings.token_type_embeddings.weight", config["type_vocab_size"], hidden)
    norm("embeddings.LayerNorm")
    for index in range(layers):
        layer = f"{names['layer']}.{index}"
        shapes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden)}
        for name, (rows, columns) in {**shapes, "up": (mlp, hidden), "down": (hidden, mlp)}.items():
            add(f"{layer}.{names[name]}.weight", rows, columns)
            add(f"{layer}.{names[name]}.bias", rows)
        norm(f"{layer}.{names['norm1']}")
        norm(f"{layer}.{names['norm2']}")
    if not distil:
        add("pooler.dense.weight", hidden, hidden)
    return tensors


def word_pieces() -> Tokenizer:
    """A WordPiece tokenizer with BERT's special tokens, [PAD] being 0."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer
