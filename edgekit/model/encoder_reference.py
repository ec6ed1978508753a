"""The encoder in NumPy: slow, readable, and what an exported graph is held against.

For token states x (T, hidden), in each layer

    a = LayerNorm(x + attention(x) Wo^T + bo)            softmax(q k^T / sqrt(head_dim)) v over all tokens
    x = LayerNorm(a + gelu(a Wu^T + bu) Wd^T + bd)       gelu(u) = u / 2 (1 + erf(u / sqrt 2))

which is BERT as published (Devlin et al., arXiv 1810.04805), in float64 between float32 weights.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint
from edgekit.model.encoder_config import EncoderConfig
from edgekit.weight import Floats

Doubles = NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def states(checkpoint: Checkpoint, config: EncoderConfig, ids: NDArray[np.int64]) -> Floats:
    """The last layer's states (texts, tokens, hidden) of ids (texts, tokens), all of the same length."""
    tokens = ids.shape[1]
    positions = checkpoint.vector("model.embed_tokens.positions")
    first = config.position_offset
    x = checkpoint.weight("model.embed_tokens").dense()[ids].astype(np.float64)
    x += positions[first : first + tokens]
    if checkpoint.has("model.embed_tokens.types"):
        x += checkpoint.vector("model.embed_tokens.types")[0]
    x = _norm(checkpoint, config, "model.embed_tokens.norm", x)
    for index in range(config.layers):
        layer = f"model.layers.{index}"
        mixed = _attention(checkpoint, config, f"{layer}.self_attn", x)
        x = _norm(checkpoint, config, f"{layer}.attention_norm", x + mixed)
        wide = _gelu(_linear(checkpoint, f"{layer}.mlp.up_proj", x))
        x = _norm(checkpoint, config, f"{layer}.output_norm", x + _linear(checkpoint, f"{layer}.mlp.down_proj", wide))
    return x.astype(np.float32)


def _attention(checkpoint: Checkpoint, config: EncoderConfig, prefix: str, x: Doubles) -> Doubles:
    def heads(name: str) -> Doubles:
        y = _linear(checkpoint, f"{prefix}.{name}_proj", x)
        split: Doubles = y.reshape(*y.shape[:2], config.heads, config.head_dim).swapaxes(1, 2)
        return split

    q, k, v = (heads(name) for name in "qkv")
    scores = q @ k.swapaxes(2, 3) / math.sqrt(config.head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    return _linear(checkpoint, f"{prefix}.o_proj", mixed.swapaxes(1, 2).reshape(x.shape))


def _linear(checkpoint: Checkpoint, module: str, x: Doubles) -> Doubles:
    y: Doubles = x @ checkpoint.weight(module).dense().T.astype(np.float64)
    return y + checkpoint.vector(f"{module}.bias")


def _norm(checkpoint: Checkpoint, config: EncoderConfig, module: str, x: Doubles) -> Doubles:
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + config.norm_eps)
    y: Doubles = unit * checkpoint.vector(f"{module}.weight") + checkpoint.vector(f"{module}.bias")
    return y


def _gelu(x: Doubles) -> Doubles:
    y: Doubles = x / 2 * (1 + _erf(x / math.sqrt(2)))
    return y
