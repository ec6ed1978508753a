"""The decoder in NumPy: slow, short, and what every exported graph is checked against.

    h = embedding[ids]
    for each layer:   h += attention(norm(h)) Wo^T;   h += (silu(n Wg^T) * (n Wu^T)) Wd^T   with n = norm(h)
    logits = norm(h) head^T

It reads one layer at a time, so a model larger than memory can be checked, and takes every width from the weights.
Source: Touvron et al., arXiv 2302.13971, in transformers' spelling (Llama, Mistral, Qwen2, Qwen3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgekit.cache_rows import keep, restore
from edgekit.checkpoint import Checkpoint
from edgekit.errors import UserError
from edgekit.model.config import DecoderConfig
from edgekit.model.heads import heads_of_layer, turned_by
from edgekit.model.rope import tables
from edgekit.weight import Floats

Watch = Callable[[int, Floats, Floats], None]
Kept = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True)
class Rounds:
    """What a runtime rounds beside the weights: what matrices read, in blocks of 32 to `steps` whole steps on either
    side of zero, in `layers` alone where given (the layer after the last is the head); keys and values to what a
    `cache` keeps (`edgekit.cache_rows`).
    """

    steps: int
    layers: frozenset[int] | None = None
    cache: Kept = "float32"

    def meets(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


def forward(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], *, rounds: Rounds | None = None
) -> list[Floats]:
    """Logits of each token sequence: a list of (T, vocabulary) float32; with `rounds`, as that takes them elsewhere.

    Raises UserError for an empty sequence or an id outside the vocabulary, ModelError for missing weights.
    """
    config = checkpoint.decoder
    table = _table(checkpoint, sequences)
    ends = np.cumsum([len(ids) for ids in sequences])
    spans = [slice(end - len(ids), end) for ids, end in zip(sequences, ends, strict=True)]
    state = table[np.concatenate([np.asarray(ids) for ids in sequences])]  # all tokens of all sequences, (T, hidden)
    if not config.tied:
        del table
    for index in range(config.layers):
        state = _Layer(checkpoint, index, rounds=rounds)(state, spans)
    norm = checkpoint.vector("model.norm.weight")
    head = table if config.tied else checkpoint.weight("lm_head").dense()
    state = rms_norm(state, norm, config.norm_eps)
    if rounds is not None and rounds.meets(config.layers):
        state = rounded(state, rounds.steps)
    logits = state @ head.T
    return [logits[span] for span in spans]


def watch_heads(checkpoint: Checkpoint, ids: Sequence[int], watch: Watch) -> None:
    """Show `watch`, for each layer, its index, and queries and keys before they are turned, (heads, T, head_dim) each.

    Raises as `forward` does.
    """
    state = _table(checkpoint, [ids])[np.asarray(ids)]
    for index in range(checkpoint.decoder.layers):
        state = _Layer(checkpoint, index, watch=watch)(state, [slice(0, len(ids))])


def _table(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> Floats:
    vocabulary = checkpoint.decoder.vocabulary
    for ids in sequences:
        if not len(ids) or min(ids) < 0 or max(ids) >= vocabulary:
            raise UserError(f"token ids must be one or more, from 0 to {vocabulary - 1}: got {list(ids)[:8]}")
    return checkpoint.weight("model.embed_tokens").dense()


class _Layer:
    """One decoder layer with its weights made dense."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, *, rounds: Rounds | None = None, watch: Watch | None = None
    ) -> None:
        self.config: DecoderConfig = checkpoint.decoder
        self.index, self.watch = index, watch
        self.rounds = rounds if rounds is not None and rounds.meets(index) else None
        prefix = f"model.layers.{index}."
        modules = [f"self_attn.{part}_proj" for part in "qkvo"] + [
            f"mlp.{part}_proj" for part in ("gate", "up", "down")
        ]
        self.weight = {name: checkpoint.weight(prefix + name).dense() for name in modules}
        self.bias = {
            name: checkpoint.vector(f"{prefix}{name}.bias")
            for name in modules
            if checkpoint.has(f"{prefix}{name}.bias")
        }
        self.heads = heads_of_layer(checkpoint, index)
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        self.norm = {
            name: checkpoint.vector(f"{prefix}{name}.weight") for name in norms if checkpoint.has(f"{prefix}{name}")
        }

    def __call__(self, state: Floats, spans: Sequence[slice]) -> Floats:
        eps = self.config.norm_eps
        state = state + self.attention(rms_norm(state, self.norm["input_layernorm"], eps), spans)
        return state + self.mlp(rms_norm(state, self.norm["post_attention_layernorm"], eps))

    def linear(self, name: str, x: Floats) -> Floats:
        if self.rounds is not None:
            x = rounded(x, self.rounds.steps)
        y: Floats = x @ self.weight[name].T
        return y + self.bias[name] if name in self.bias else y

    def mlp(self, x: Floats) -> Floats:
        gate = self.linear("mlp.gate_proj", x)
        with np.errstate(over="ignore"):  # where exp(-gate) is inf, silu is 0, as it should be
            active = gate / (1 + np.exp(-gate))
        return self.linear("mlp.down_proj", active * self.linear("mlp.up_proj", x))

    def attention(self, x: Floats, spans: Sequence[slice]) -> Floats:
        q, k, v = (self.linear(f"self_attn.{name}_proj", x) for name in "qkv")
        mixed = [self.attend(q[span], k[span], v[span]) for span in spans]
        return self.linear("self_attn.o_proj", np.concatenate(mixed))

    def attend(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """Causal attention of one sequence: q (T, heads * size), k (T, kv_heads * size), v (T, kv_heads * its size)."""
        length, width = len(q), self.heads.key_size
        sizes = (width, width, self.heads.value_size)
        q, k, v = (x.reshape(length, -1, size).swapaxes(0, 1) for x, size in zip((q, k, v), sizes, strict=True))
        if "self_attn.q_norm" in self.norm:
            q = rms_norm(q, self.norm["self_attn.q_norm"], self.config.norm_eps)
            k = rms_norm(k, self.norm["self_attn.k_norm"], self.config.norm_eps)
        if self.watch is not None:
            self.watch(self.index, q, k)
        q, k = self.rotate(q), self.rotate(k)
        if self.rounds is not None:
            k, v = (kept(part, self.rounds.cache) for part in (k, v))
        group = len(q) // len(k)
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(width))
        distance = np.arange(length)[:, None] - np.arange(length)
        hidden = distance < 0
        if self.config.sliding_window:
            hidden |= distance >= self.config.sliding_window
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed: Floats = (weights / weights.sum(-1, keepdims=True)) @ v
        return mixed.swapaxes(0, 1).reshape(length, -1)

    def rotate(self, x: Floats) -> Floats:
        """Turn (heads, T, head_dim) by each position's angles."""
        found = tables(self.config.rope, self.config.head_dim, x.shape[-2])
        cos, sin = (turned_by(table, self.heads.pairs) for table in found)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / rms(x) * weight over the last axis. Source: Zhang and Sennrich, arXiv 1910.07467."""
    normed: Floats = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed


def kept(x: Floats, cache: Kept) -> Floats:
    """Rows (..., d) of keys or values as a cache keeps them."""
    if cache == "float32":
        return x
    if cache == "float16":
        return x.astype(np.float16).astype(np.float32)
    return restore(*keep(x, 8 if cache == "int8" else 4)).astype(np.float32)


def rounded(x: Floats, steps: int, block: int = 32) -> Floats:
    """x (T, K) after rounding each block of columns to `steps` whole steps on either side of zero."""
    padded = np.pad(x, [(0, 0), (0, -x.shape[1] % block)])
    blocks = padded.reshape(len(x), -1, block)
    step = np.abs(blocks).max(-1, keepdims=True) / np.float32(steps)
    codes = np.rint(blocks / np.where(step == 0, np.float32(1), step))
    result: Floats = (step * codes).reshape(padded.shape)[:, : x.shape[1]]
    return result
