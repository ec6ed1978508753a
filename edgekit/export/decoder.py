"""The decoder graph, built node by node from the weights.

Inputs:  input_ids (1, T) int64; seqlens_k (1,) int32, the index of the last token; total_sequence_length () int32;
         logits_to_keep () int64, how many of the last tokens get logits; past_key_values.i.{key,value}
         (1, kv_heads, S, head_dim) float32, the cache.
Outputs: logits (1, K, vocabulary) float32; present.i.{key,value}, which may be the very buffers of the past: then the
         cache grows in place, up to S tokens.

Every width comes from the shapes of the layer's own weights, so layers may differ, and a removed layer needs nothing.
Nodes are named by module path. Only operators of stock onnxruntime are used: MatMulNBits, GatherBlockQuantized,
GroupQueryAttention and SkipSimplifiedLayerNormalization of com.microsoft beside the standard ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.export.fit import layer_caches
from edgekit.export.graph import Graph
from edgekit.model.rope import tables
from edgekit.weight import Dense, Quantized, Weight


def build_decoder(
    checkpoint: Checkpoint, folder: Path, *, context: int, int8_activations: bool
) -> tuple[LayerCache, ...]:
    """Write model.onnx and its weights into `folder`; returns each layer's cache.

    `context` is the number of positions that the rotary tables cover. `int8_activations` lets quantised matrices
    multiply in integers (accuracy level 4 of MatMulNBits); without it they multiply in float32.
    Raises ModelError for weights that are missing or do not fit each other.
    """
    caches = layer_caches(checkpoint)
    with Graph(folder) as graph:
        _Decoder(checkpoint, graph, context, 4 if int8_activations else 0).build(caches)
    return caches


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, graph: Graph, context: int, accuracy_level: int) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.decoder
        self.graph = graph
        self.context = context
        self.accuracy_level = accuracy_level

    def build(self, caches: Sequence[LayerCache]) -> None:
        config, graph = self.config, self.graph
        cosine, sine = tables(config.rope, config.head_dim, self.context)
        graph.constant("rotary.cos", cosine)
        graph.constant("rotary.sin", sine)
        state = self.embed("model.embed_tokens")
        normed = graph.node(
            "SimplifiedLayerNormalization",
            [state, self.norm("model.layers.0.input_layernorm")],
            "model.layers.0.input_layernorm",
            epsilon=config.norm_eps,
            axis=-1,
        )
        for index, cache in enumerate(caches):
            prefix = f"model.layers.{index}"
            following = f"model.layers.{index + 1}.input_layernorm" if index + 1 < config.layers else "model.norm"
            mixed = self.attention(f"{prefix}.self_attn", normed, index, kv_heads=cache.kv_heads)
            normed, state = self.add_and_norm(state, mixed, f"{prefix}.post_attention_layernorm")
            normed, state = self.add_and_norm(state, self.mlp(f"{prefix}.mlp", normed), following)
        self.head(normed)
        graph.save(*self.signature(caches), title=config.architecture)

    def embed(self, module: str) -> str:
        weight = self.checkpoint.weight(module)
        if isinstance(weight, Dense):
            table = self.graph.constant(f"{module}.weight", weight.values)
            return self.graph.node("Gather", [table, "input_ids"], module, axis=0)
        self.store(module, weight)
        rows, blocks, width = weight.codes.shape
        codes = self.graph.same_bytes(f"{module}.table", f"{module}.codes", (rows, blocks * width))
        inputs = [codes, "input_ids", f"{module}.scales"]
        if weight.zeros is not None:
            inputs.append(f"{module}.zeros")
        state = self.graph.contrib(
            "GatherBlockQuantized",
            inputs,
            module,
            bits=weight.bits,
            block_size=weight.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if blocks * weight.block == weight.columns:
            return state
        return self.slice(state, 0, weight.columns, axis=2, name=f"{module}.unpadded")

    def attention(self, prefix: str, x: str, index: int, *, kv_heads: int) -> str:
        modules = [f"{prefix}.{name}_proj" for name in "qkv"]
        normed_heads = self.checkpoint.has(f"{prefix}.q_norm")
        if fused := None if normed_heads else self.linears(modules, x, f"{prefix}.qkv_proj"):
            query, key, value = fused, "", ""
        else:
            query, key, value = (self.linear(module, x) for module in modules)
        if normed_heads:
            query, key = self.head_norm(query, f"{prefix}.q_norm"), self.head_norm(key, f"{prefix}.k_norm")
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        mixed = self.graph.contrib(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_sequence_length", "rotary.cos", "rotary.sin"],
            prefix,
            outputs=[prefix, f"present.{index}.key", f"present.{index}.value"],
            num_heads=self.checkpoint.shape(f"{prefix}.q_proj")[0] // self.config.head_dim,
            kv_num_heads=kv_heads,
            do_rotary=1,
            local_window_size=self.config.sliding_window or -1,
        )
        return self.linear(f"{prefix}.o_proj", mixed)

    def head_norm(self, x: str, module: str) -> str:
        """RMSNorm of each head by itself, as Qwen3 does before the rotation."""
        width = self.config.head_dim
        shape = self.graph.constant("shape.heads", np.array([0, 0, -1, width], np.int64))
        flat = self.graph.constant("shape.flat", np.array([0, 0, -1], np.int64))
        heads = self.graph.node("Reshape", [x, shape], f"{module}.heads")
        normed = self.graph.node(
            "SimplifiedLayerNormalization", [heads, self.norm(module)], module, epsilon=self.config.norm_eps, axis=-1
        )
        return self.graph.node("Reshape", [normed, flat], f"{module}.flat")

    def mlp(self, prefix: str, x: str) -> str:
        gate, up = self.linear(f"{prefix}.gate_proj", x), self.linear(f"{prefix}.up_proj", x)
        active = self.graph.contrib("QuickGelu", [gate], f"{prefix}.act", alpha=1.0)  # x * sigmoid(x), that is silu
        return self.linear(f"{prefix}.down_proj", self.graph.node("Mul", [active, up], f"{prefix}.gated"))

    def head(self, x: str) -> None:
        """Logits of the last `logits_to_keep` tokens."""
        graph = self.graph
        count = graph.node(
            "Unsqueeze", ["logits_to_keep", graph.constant("zero", np.array([0], np.int64))], "keep.count"
        )
        start = graph.node("Neg", [count], "keep.start")
        end = graph.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
        kept = graph.node("Slice", [x, start, end, graph.constant("axis.tokens", np.array([1], np.int64))], "keep")
        if not self.config.tied:
            self.linear("lm_head", kept, output="logits")
            return
        module = "model.embed_tokens"
        weight = self.checkpoint.weight(module)
        if isinstance(weight, Quantized):
            self.quantized(module, weight, kept, bias="", name="lm_head", output="logits")
            return
        # The table is stored once, as (vocabulary, hidden): Gemm reads it transposed, and wants a matrix.
        flat = graph.node("Squeeze", [kept, graph.constant("axis.batch", np.array([0], np.int64))], "keep.flat")
        logits = graph.node("Gemm", [flat, f"{module}.weight"], "lm_head", transB=1)
        graph.node("Unsqueeze", [logits, "axis.batch"], "lm_head.batch", outputs=["logits"])

    def linears(self, modules: Sequence[str], x: str, name: str) -> str | None:
        """Several matrices that read the same input as one, or None when they are not stored alike."""
        weights = [self.checkpoint.weight(module) for module in modules]
        joined = concatenate(weights)
        if joined is None:
            return None
        biases = [self.bias(module, weight) for module, weight in zip(modules, weights, strict=True)]
        bias = (
            ""
            if all(b is None for b in biases)
            else self.graph.constant(
                f"{name}.bias",
                np.concatenate(
                    [np.zeros(w.shape[0], np.float32) if b is None else b for b, w in zip(biases, weights, strict=True)]
                ),
            )
        )
        return self.apply(name, joined, x, bias=bias, output=name)

    def linear(self, module: str, x: str, *, output: str = "") -> str:
        weight = self.checkpoint.weight(module)
        bias = self.bias(module, weight)
        named = "" if bias is None else self.graph.constant(f"{module}.bias", bias)
        return self.apply(module, weight, x, bias=named, output=output or module)

    def bias(self, module: str, weight: Weight) -> np.ndarray | None:
        if not self.checkpoint.has(f"{module}.bias"):
            return None
        bias = self.checkpoint.vector(f"{module}.bias")
        if bias.shape != (weight.shape[0],):
            raise ModelError(
                f"a bias must have one value a row: {module}.bias has {bias.shape}, its matrix {weight.shape}"
            )
        return bias

    def apply(self, name: str, weight: Weight, x: str, *, bias: str, output: str) -> str:
        """y = x W^T + b."""
        if isinstance(weight, Quantized):
            return self.quantized(name, weight, x, bias=bias, name=name, output=output)
        table = self.graph.constant(f"{name}.weight", weight.values.T)
        if not bias:
            return self.graph.node("MatMul", [x, table], name, outputs=[output])
        product = self.graph.node("MatMul", [x, table], name, outputs=[f"{name}.product"])
        return self.graph.node("Add", [product, bias], f"{name}.add", outputs=[output])

    def quantized(self, module: str, weight: Quantized, x: str, *, bias: str, name: str, output: str) -> str:
        self.store(module, weight)
        zeros = f"{module}.zeros" if weight.zeros is not None else ""
        return self.graph.contrib(
            "MatMulNBits",
            [x, f"{module}.codes", f"{module}.scales", zeros, "", bias],
            name,
            outputs=[output],
            K=weight.columns,
            N=weight.shape[0],
            bits=weight.bits,
            block_size=weight.block,
            accuracy_level=self.accuracy_level,
        )

    def store(self, module: str, weight: Quantized) -> None:
        self.graph.constant(f"{module}.codes", weight.codes)
        self.graph.constant(f"{module}.scales", weight.scales.astype(np.float32))
        if weight.zeros is not None:
            self.graph.constant(f"{module}.zeros", weight.zeros)

    def add_and_norm(self, state: str, update: str, module: str) -> tuple[str, str]:
        """(norm(state + update), state + update) in one node."""
        total = f"{module}.residual"
        last = module == "model.norm"
        normed = self.graph.contrib(
            "SkipSimplifiedLayerNormalization",
            [state, update, self.norm(module)],
            module,
            outputs=[module] if last else [module, "", "", total],
            epsilon=self.config.norm_eps,
        )
        return normed, total

    def norm(self, module: str) -> str:
        return self.graph.constant(f"{module}.weight", self.checkpoint.vector(f"{module}.weight"))

    def slice(self, x: str, start: int, end: int, *, axis: int, name: str) -> str:
        bounds = [np.array([value], np.int64) for value in (start, end, axis)]
        names = [self.graph.constant(f"{name}.{key}", b) for key, b in zip(("from", "to", "axis"), bounds, strict=True)]
        return self.graph.node("Slice", [x, *names], name)

    def signature(self, caches: Sequence[LayerCache]) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, []),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "kept", self.config.vocabulary])]
        for index, cache in enumerate(caches):
            for part in ("key", "value"):
                dims = [1, cache.kv_heads, "cache", cache.head_dim]
                past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
                inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, dims))
                outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, dims))
        return inputs, outputs


def concatenate(weights: Sequence[Weight]) -> Weight | None:
    """Matrices over the same columns stacked by rows, or None when they are stored in different ways."""
    if all(isinstance(weight, Dense) for weight in weights):
        return Dense(np.concatenate([weight.dense() for weight in weights]))
    if not all(isinstance(weight, Quantized) for weight in weights):
        return None
    parts = [weight for weight in weights if isinstance(weight, Quantized)]
    first = parts[0]
    layout = (first.bits, first.block, first.columns, first.zeros is None)
    if any((part.bits, part.block, part.columns, part.zeros is None) != layout for part in parts):
        return None
    return Quantized(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=None if first.zeros is None else np.concatenate([p.zeros for p in parts if p.zeros is not None]),
        bits=first.bits,
        block=first.block,
        columns=first.columns,
    )
