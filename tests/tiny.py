"""Tiny random models of the Llama family for tests: as a transformers folder, or as the GGUF file of the same weights.

They are written without torch, the same bytes for the same arguments. The tokenizer is a real byte-level BPE with
`<|endoftext|>` = 0, `<|im_start|>` = 1 and `<|im_end|>` = 2; rows of the vocabulary that it does not fill are padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the warm afternoon sun.",
    "A small model that runs on the device in your hand needs no network, no account and no permission.",
    "Every good test can fail; a test that cannot fail is worse than none, since somebody will believe it.",
    "Measure the memory, the latency and the power; then change one thing, and measure all of them again.",
    "def add(left: int, right: int) -> int:\n    return left + right\n\nprint(add(12, 30))\n",
    "Wörter mit Umlauten, des mots accentués, слова на русском и 你好，世界 are words like any other.",
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

LINE = "The quick brown fox jumps over the lazy dog; a small model runs on the device in your hand.\n"


def tiny_folder(
    path: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    mlp: int = 96,
    vocabulary: int = 384,
    tied: bool = True,
    seed: int = 0,
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a transformers folder and return it. `config` overrides entries of its config.json."""
    written = tiny_config(
        architecture=architecture, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        mlp=mlp, vocabulary=vocabulary, tied=tied, dtype=dtype,
    )  # fmt: skip
    tensors = tiny_tensors(written, seed=seed)
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: np.ascontiguousarray(values.astype(DTYPES[dtype])) for name, values in tensors.items()}
    safetensors.numpy.save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    texts = {
        "config.json": json.dumps({**written, **(config or {})}, indent=1),
        "generation_config.json": json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, indent=1),
        "tokenizer.json": tiny_tokenizer(vocabulary).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
            },
            indent=1,
        ),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, text in texts.items():
        (path / name).write_text(text)
    return path


def tiny_gguf(
    path: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    mlp: int = 96,
    vocabulary: int = 384,
    tied: bool = True,
    seed: int = 0,
    quantization: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write the model that `tiny_folder` writes with the same arguments as a GGUF file, and return it.

    `quantization` names the type of the matrices (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q6_K); the rest is F32.
    `metadata` adds or replaces keys, None removes one; `tensors` adds tensors by their GGUF names.
    """
    config = tiny_config(
        architecture=architecture, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        mlp=mlp, vocabulary=vocabulary, tied=tied, dtype="float32",
    )  # fmt: skip
    family = "llama" if config["model_type"] == "mistral" else config["model_type"]
    tokenizer = tiny_tokenizer(vocabulary)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = [3 if index < 3 else 1 if index in tokens else 5 for index in range(vocabulary)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    values: dict[str, Any] = {
        "general.name": "Tiny Test Model",
        "general.license": "apache-2.0",
        f"{family}.context_length": config["max_position_embeddings"],
        f"{family}.embedding_length": hidden,
        f"{family}.block_count": layers,
        f"{family}.feed_forward_length": mlp,
        f"{family}.attention.head_count": heads,
        f"{family}.attention.head_count_kv": kv_heads,
        f"{family}.attention.key_length": config["head_dim"],
        f"{family}.attention.value_length": config["head_dim"],
        f"{family}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{family}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{family}.rope.dimension_count": config["head_dim"],
        f"{family}.vocab_size": vocabulary,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [tokens.get(index, f"[PAD{index}]") for index in range(vocabulary)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", family))
    for key, value in values.items():
        add_value(writer, key, value)
    for name, array in tiny_tensors(config, seed=seed).items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, heads if "q_proj" in name else kv_heads)
        kind = gguf.GGMLQuantizationType[quantization if array.ndim == 2 else "F32"]
        data = (
            array if kind.name == "F32" else q6_k(array) if kind.name == "Q6_K" else gguf.quants.quantize(array, kind)
        )
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q6_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows of multiples of 256 weights as blocks of Q6_K, which the gguf package reads and does not write."""
    blocks = values.reshape(len(values), -1, 16, 16)
    peaks = np.abs(blocks).max(-1)
    d = (peaks.max(-1, keepdims=True) / (127 * 31)).astype(np.float16)
    scales = np.rint(peaks / 31 / np.maximum(d.astype(np.float32), 1e-8)).astype(np.int8)
    steps = np.where(scales == 0, np.inf, d.astype(np.float32) * scales)[..., None]
    codes = np.clip(np.rint(blocks / steps) + 32, 0, 63).astype(np.uint8).reshape(len(values), -1, 2, 4, 32)
    low, high = (codes & 15).reshape(*codes.shape[:3], 2, 64), codes >> 4
    halves = low[..., 0, :] | low[..., 1, :] << 4
    pairs = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    parts = (halves, pairs, scales.view(np.uint8), d.view(np.uint8))
    return np.concatenate([part.reshape(*codes.shape[:2], -1) for part in parts], axis=-1).reshape(len(values), -1)


def tiny_config(
    *,
    architecture: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None,
    mlp: int,
    vocabulary: int,
    tied: bool,
    dtype: str,
) -> dict[str, Any]:
    """The config.json of a tiny model, as transformers 5 writes it."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
    }
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = None
    return config


def tiny_tensors(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The tensors of the model that `config` describes, by transformers' names, float32."""
    rng = np.random.default_rng(seed)
    hidden, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return values

    def vector(size: int, mean: float) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (mean + 0.1 * rng.standard_normal(size)).astype(np.float32)
        return values

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for module, (rows, columns) in shapes.items():
            tensors[f"{prefix}{module}.weight"] = matrix(rows, columns)
        for module in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{module}.weight"] = vector(hidden, 1.0)
        if config["model_type"] == "qwen2":
            for module in ("q_proj", "k_proj", "v_proj"):
                rows = shapes[f"self_attn.{module}"][0]
                tensors[f"{prefix}self_attn.{module}.bias"] = vector(rows, 0.0)
        if config["model_type"] == "qwen3":
            for module in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{module}.weight"] = vector(head_dim, 1.0)
    tensors["model.norm.weight"] = vector(hidden, 1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def tiny_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` (>= 259) tokens, with SmolLM2's splits, trained on `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{GGUF_NAMES[module]}.{leaf}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{leaf}"


def interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Order the rows of each head (0, d/2, 1, d/2 + 1, ...), as llama GGUF files keep q and k for interleaved RoPE."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one metadata value with the type that llama.cpp's converter gives it; None writes nothing."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
