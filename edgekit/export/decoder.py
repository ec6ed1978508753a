"""The decoder graph, built node by node from the weights, of stock onnxruntime's operators.

Every width comes from the shapes of the layer's own weights, so layers may differ, and a removed layer needs nothing.
MatMulNBits, GatherBlockQuantized, GroupQueryAttention and SkipSimplifiedLayerNormalization of com.microsoft are used
beside the standard operators. Inputs and outputs: `edgekit.export.parts`; the cache is float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.export.fit import layer_caches, layer_heads
from edgekit.export.graph import Graph
from edgekit.export.parts import Parts
from edgekit.export.values import padded_values
from edgekit.model.heads import Heads


def build_decoder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    context: int,
    integer_bits: Collection[int],
    exact_layers: Collection[int] = (),
) -> tuple[LayerCache, ...]:
    """Write model.onnx and its weights into `folder`; returns each layer's cache.

    `context` is the number of positions that the rotary tables cover. Quantised matrices of `integer_bits` multiply in
    integers, with activations rounded to 8 bits; others, and those of `exact_layers` (the head counts as one more
    layer), multiply in float32.
    Raises ModelError for weights that are missing or do not fit each other.
    """
    caches, heads = layer_caches(checkpoint), layer_heads(checkpoint)
    checkpoint = padded_values(checkpoint, heads)
    with Graph(folder) as graph:
        parts = Parts(checkpoint, graph, integer_bits=integer_bits, exact_layers=exact_layers)
        parts.rotary_tables(context)
        _Decoder(parts, heads).build(caches)
    return caches


class _Decoder:
    """The flow of the graph: which node reads which."""

    def __init__(self, parts: Parts, heads: Sequence[Heads]) -> None:
        self.parts = parts
        self.heads = heads
        self.checkpoint = parts.checkpoint
        self.config = parts.config
        self.graph = parts.graph

    def build(self, caches: Sequence[LayerCache]) -> None:
        state = self.parts.embed("model.embed_tokens")
        normed = self.parts.normed(state, "model.layers.0.input_layernorm")
        for index in range(len(caches)):
            prefix = f"model.layers.{index}"
            following = f"model.layers.{index + 1}.input_layernorm" if index + 1 < len(caches) else "model.norm"
            mixed = self.attention(f"{prefix}.self_attn", normed, index)
            normed, state = self.add_and_norm(state, mixed, f"{prefix}.post_attention_layernorm")
            normed, state = self.add_and_norm(state, self.mlp(f"{prefix}.mlp", normed), following)
        self.parts.head(self.parts.keep_last(normed))
        signature = self.parts.signature(caches, cache_type=TensorProto.FLOAT)
        self.graph.save(*signature, title=self.config.architecture)

    def attention(self, prefix: str, x: str, index: int) -> str:
        heads = self.heads[index]
        modules = [f"{prefix}.{name}_proj" for name in "qkv"]
        normed_heads = self.checkpoint.has(f"{prefix}.q_norm")
        if fused := None if normed_heads else self.parts.linears(modules, x, f"{prefix}.qkv_proj"):
            query, key, value = fused, "", ""
        else:
            query, key, value = (self.parts.linear(module, x) for module in modules)
        if normed_heads:
            query, key = self.head_norm(query, f"{prefix}.q_norm"), self.head_norm(key, f"{prefix}.k_norm")
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        mixed = self.graph.contrib(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_sequence_length", *self.parts.rotary(prefix, heads)],
            prefix,
            outputs=[prefix, f"present.{index}.key", f"present.{index}.value"],
            num_heads=heads.queries,
            kv_num_heads=heads.keys,
            do_rotary=1,
            local_window_size=self.config.sliding_window or -1,
        )
        return self.parts.linear(f"{prefix}.o_proj", self.parts.unpadded_values(prefix, mixed, heads))

    def head_norm(self, x: str, module: str) -> str:
        """RMSNorm of each head by itself, as Qwen3 does before the rotation."""
        width = self.config.head_dim
        shape = self.graph.constant("shape.heads", np.array([0, 0, -1, width], np.int64))
        flat = self.graph.constant("shape.flat", np.array([0, 0, -1], np.int64))
        heads = self.graph.node("Reshape", [x, shape], f"{module}.heads")
        normed = self.parts.normed(heads, module)
        return self.graph.node("Reshape", [normed, flat], f"{module}.flat")

    def mlp(self, prefix: str, x: str) -> str:
        gate, up = self.parts.linear(f"{prefix}.gate_proj", x), self.parts.linear(f"{prefix}.up_proj", x)
        active = self.graph.contrib("QuickGelu", [gate], f"{prefix}.act", alpha=1.0)  # x * sigmoid(x), that is silu
        return self.parts.linear(f"{prefix}.down_proj", self.graph.node("Mul", [active, up], f"{prefix}.gated"))

    def add_and_norm(self, state: str, update: str, module: str) -> tuple[str, str]:
        """(norm(state + update), state + update) in one node."""
        total = f"{module}.residual"
        last = module == "model.norm"
        normed = self.graph.contrib(
            "SkipSimplifiedLayerNormalization",
            [state, update, self.parts.norm(module)],
            module,
            outputs=[module] if last else [module, "", "", total],
            epsilon=self.config.norm_eps,
        )
        return normed, total
