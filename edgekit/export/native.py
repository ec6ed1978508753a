"""The decoder graph over our own operators: five a layer, and one node where a layer has just these.

    NormQuantLinear         norm, then q, k and v in one matrix
    Attention               rotary embedding, cache append in place, exact attention over the cache
    QuantLinear             output projection, plus the residual
    GatedNormQuantLinear    norm, then gate and up, then silu(gate) * up
    QuantLinear             down projection, plus the residual

Weights lie in tiles as the kernels read them, so they are mapped and never copied. The model holds each operator's
meaning as a function of standard operators too: stock onnxruntime runs that where the kernels are not registered.
A matrix that is not quantised stays a MatMul. Inputs and outputs: `edgekit.export.parts`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.export.fit import layer_caches, layer_heads, usual_caches
from edgekit.export.graph import Graph
from edgekit.export.parts import Parts
from edgekit.export.sparse import KeyCode, SparseOptions
from edgekit.export.values import padded_values
from edgekit.kernels.functions import function_bodies
from edgekit.kernels.opset import DOMAIN, LAYER, OPS, CacheType, attention_op, layer_attributes, layer_parts
from edgekit.kernels.pack import LANES, Tiles, interleave, tile
from edgekit.model.heads import Heads
from edgekit.weight import Dense, Factored, Quantized, concatenate, stored_parts


def build_native_decoder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    context: int,
    sparse: SparseOptions | None = None,
    keys: Sequence[KeyCode] = (),
    cache: CacheType = "float16",
    coarse_layers: Collection[int] = (),
) -> tuple[LayerCache, ...]:
    """Write model.onnx and its weights into `folder`; returns each layer's cache. Errors: see `build_decoder`.

    With `sparse`, whose layers need the codes `keys`, tokens attend to a part of a long cache. `cache` is what keys and
    values are kept in. In `coarse_layers` (the head counts as one more layer) products take activations of 8 bits.
    """
    caches = layer_caches(checkpoint) if sparse is None else usual_caches(checkpoint, "sparse attention")
    heads = layer_heads(checkpoint)
    checkpoint = padded_values(checkpoint, heads)
    if sparse is not None:
        caches = tuple(replace(layer, sparse=index >= sparse.dense_layers) for index, layer in enumerate(caches))
    with Graph(folder) as graph:
        parts = Parts(checkpoint, graph, integer_bits=(4, 8))
        parts.rotary_tables(context)
        _NativeDecoder(parts, heads, sparse, keys, cache, coarse_layers).build(caches)
    return caches


def runs_natively(checkpoint: Checkpoint) -> bool:
    """Whether our operators have something to do here: quantised matrices, and heads that fill whole vectors."""
    quantized = any(entry.kind == "quantized" for entry in checkpoint.structure.values())
    return quantized and checkpoint.decoder.head_dim % LANES == 0


class _NativeDecoder:
    """The flow of the graph: which node reads which."""

    def __init__(
        self,
        parts: Parts,
        heads: Sequence[Heads],
        sparse: SparseOptions | None,
        keys: Sequence[KeyCode],
        cache: CacheType,
        coarse_layers: Collection[int],
    ) -> None:
        self.coarse_layers = coarse_layers
        self.activation_bits: dict[str, int] = {}  # of the layer that is built
        self.parts = parts
        self.heads = heads
        self.cache = cache
        self.sparse = sparse
        self.keys = keys
        self.checkpoint = parts.checkpoint
        self.config = parts.config
        self.graph = parts.graph

    def build(self, caches: Sequence[LayerCache]) -> None:
        state = self.embed("model.embed_tokens")
        if self.sparse is not None and self.sparse.wide_layers:
            least = self.graph.constant("budget.least", np.array([self.sparse.wide_budget], np.int32))
            self.wide_budget = self.graph.node("Max", ["budget", least], "budget.wide")
        for index, cache in enumerate(caches):
            self.round_in(index)
            size, before = self.graph.size, state
            layer = f"model.layers.{index}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            qkv = self.read([f"{attention}.{x}_proj" for x in "qkv"], state, norm=f"{layer}.input_layernorm")
            mixed = self.attend(attention, qkv, index, cache)
            mixed = self.parts.unpadded_values(attention, mixed, self.heads[index])
            state = self.add(f"{attention}.o_proj", mixed, state)
            gated = self.gate(mlp, state, norm=f"{layer}.post_attention_layernorm")
            state = self.add(f"{mlp}.down_proj", gated, state)
            self.join(layer, size, before)
        self.round_in(len(caches))
        self.head(self.parts.keep_last(state))
        kept = {"float16": TensorProto.FLOAT16, "int8": TensorProto.INT8, "int4": TensorProto.UINT8}[self.cache]
        inputs, outputs = self.parts.signature(caches, cache_type=kept, together=2 if self.cache == "int4" else 1)
        for index, cache in enumerate(caches):
            beside = {"scales": (TensorProto.FLOAT16, 2 * cache.kv_heads)} if self.cache != "float16" else {}
            beside |= {part: (TensorProto.UINT8, cache.kv_heads) for part in ("codes", "means") if cache.sparse}
            for part, (kind, rows) in beside.items():
                dims = [1, rows, "cache" if part == "scales" else part]
                past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
                inputs.append(helper.make_tensor_value_info(past, kind, dims))
                outputs.append(helper.make_tensor_value_info(present, kind, dims))
        if any(cache.sparse for cache in caches):
            inputs.append(helper.make_tensor_value_info("budget", TensorProto.INT32, [1]))
        self.graph.save(inputs, outputs, title=self.config.architecture, functions=function_bodies())

    def join(self, layer: str, size: int, state: str) -> None:
        """One node in place of those that were added after `size`, where they are the usual five."""
        nodes = self.graph.since(size)
        attention = nodes[1].op_type if len(nodes) == len(LAYER) else ""
        if f"{attention}Layer" not in OPS:
            return
        parts = layer_parts(attention)
        if [node.op_type for node in nodes] != [part.name for part in parts.values()]:
            return
        passed = {state, *(node.output[0] for node in nodes)}
        inputs = [name for node in nodes for name in node.input if name not in passed]
        attributes: dict[str, float] = {}
        for node, (prefix, part) in zip(nodes, parts.items(), strict=True):
            given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            attributes |= {outer: given[name] for name, outer in layer_attributes(prefix, part).items()}
        outputs = [nodes[-1].output[0], *nodes[1].output[1:]]
        self.graph.cut(size)
        self.graph.node(
            f"{attention}Layer",
            [state, *inputs],
            layer,
            outputs=outputs,
            domain=DOMAIN,
            **attributes,
            **self.activation_bits,
        )

    def round_in(self, layer: int) -> None:
        """What follows is this layer's."""
        self.activation_bits = {"activation_bits": 8} if layer in self.coarse_layers else {}

    def embed(self, module: str) -> str:
        weight = self.checkpoint.weight(module)
        if not isinstance(weight, Quantized):
            return self.parts.embed(module)
        return self.node("QuantEmbedding", ["input_ids"], module, tile(weight), output=module)

    def attend(self, prefix: str, qkv: str, index: int, cache: LayerCache) -> str:
        norms = [f"{prefix}.{x}_norm" for x in "qk"]
        normed = all(map(self.checkpoint.has, norms))
        parts = [
            "key",
            "value",
            *(["scales"] if self.cache != "float16" else ()),
            *(["codes", "means"] if cache.sparse else ()),
        ]
        further: dict[str, float] = {"epsilon": self.config.norm_eps} if normed else {}
        found: list[str] = []
        if cache.sparse and self.sparse is not None:
            code = self.keys[index]
            found = [
                self.graph.constant(f"{prefix}.center", code.center),
                self.graph.constant(f"{prefix}.encoder", code.encoder),
                self.graph.constant(f"{prefix}.decoder", code.decoder),
                self.wide_budget if index < self.sparse.dense_layers + self.sparse.wide_layers else "budget",
            ]
            options = self.sparse
            further |= {"sinks": options.sinks, "recent": options.recent, "followers": options.followers}
            further |= {"dense_below": options.dense_below}
            further |= {"per_query_head": int(options.per_query_head), "adamas": int(options.adamas)}
            further["prefill_budget"] = options.prefill_budget
        return self.graph.node(
            attention_op(normed=normed, sparse=cache.sparse, cache=self.cache),
            [
                qkv,
                *(f"past_key_values.{index}.{part}" for part in parts),
                *("seqlens_k", *self.parts.rotary(prefix, self.heads[index])),
                *found,
                *(map(self.parts.norm, norms) if normed else ()),
            ],
            prefix,
            outputs=[prefix, *(f"present.{index}.{part}" for part in parts)],
            domain=DOMAIN,
            num_heads=self.heads[index].queries,
            kv_num_heads=cache.kv_heads,
            head_dim=cache.head_dim,
            local_window_size=self.config.sliding_window or -1,
            **further,
        )

    def read(self, modules: Sequence[str], state: str, *, norm: str, output: str = "") -> str:
        """Norm, then the matrices of `modules` one after the other: one node where they are quantised alike."""
        joined = concatenate([self.checkpoint.weight(module) for module in modules])
        name = f"{modules[0]}.joined" if len(modules) > 1 else modules[0]
        if isinstance(joined, Quantized):
            bias = self.parts.joined_bias(modules)
            inputs = [state, self.parts.norm(norm)]
            last = [self.nothing() if bias is None else self.graph.constant(f"{name}.bias", bias)]
            return self.node("NormQuantLinear", inputs, name, tile(joined), last, output=output)
        normed = self.parts.normed(state, norm)
        products = [self.product(module, normed) for module in modules]
        return self.graph.node("Concat", products, name, outputs=[output or name], axis=-1)

    def gate(self, mlp: str, state: str, *, norm: str) -> str:
        """silu(gate) * up of the normed state."""
        modules = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        weights = [self.checkpoint.weight(module) for module in modules]
        gate, up = weights
        alike = isinstance(concatenate(weights), Quantized) and self.parts.joined_bias(modules) is None
        if alike and isinstance(gate, Quantized) and isinstance(up, Quantized) and gate.shape == up.shape:
            inputs = [state, self.parts.norm(norm)]
            return self.node("GatedNormQuantLinear", inputs, f"{mlp}.gated", interleave(tile(gate), tile(up)))
        normed = self.parts.normed(state, norm)
        products = [self.product(module, normed) for module in modules]
        active = self.graph.contrib("QuickGelu", products[:1], f"{mlp}.act", alpha=1.0)
        return self.graph.node("Mul", [active, products[1]], f"{mlp}.gated")

    def add(self, module: str, x: str, state: str) -> str:
        """The state plus a matrix of x."""
        weight = self.checkpoint.weight(module)
        last = weight.factors[0] if isinstance(weight, Factored) and weight.is_low_rank else weight
        if isinstance(last, Quantized):
            return self.product(module, x, residual=state)
        return self.graph.node("Add", [self.product(module, x), state], f"{module}.sum")

    def product(self, module: str, x: str, *, residual: str = "") -> str:
        weight = self.checkpoint.weight(module)
        if isinstance(weight, Dense):
            return self.parts.linear(module, x)
        bias = self.parts.joined_bias([module])
        named = self.nothing() if bias is None else self.graph.constant(f"{module}.bias", bias)
        if isinstance(weight, Quantized):
            return self.factor(module, weight, x, bias=named, residual=residual)
        if weight.is_low_rank and isinstance(weight.factors[0], Quantized):
            (name, last), (other, first) = stored_parts(module, weight)
            return self.factor(name, last, self.factor(other, first, x), bias=named, residual=residual)
        return self.graph.node("Add", [self.parts.factored(module, weight, x, self.factor), named], f"{module}.biased")

    def factor(self, name: str, weight: Dense | Quantized, x: str, *, bias: str = "", residual: str = "") -> str:
        """x W^T, plus what is named where the matrix is quantised."""
        if isinstance(weight, Dense):
            return self.parts.factor(name, weight, x)
        return self.node("QuantLinear", [x], name, tile(weight), [bias or self.nothing(), residual or self.nothing()])

    def head(self, kept: str) -> None:
        module = "model.embed_tokens" if self.config.tied else "lm_head"
        if isinstance(self.checkpoint.weight(module), Quantized):
            self.read([module], kept, norm="model.norm", output="logits")
        else:
            self.parts.head(self.parts.normed(kept, "model.norm"))

    def node(
        self, op: str, inputs: Sequence[str], name: str, tiles: Tiles, last: Sequence[str] = (), *, output: str = ""
    ) -> str:
        """One of our operators over a quantised matrix, whose constants go before and after `last`."""
        further: dict[str, float] = {"epsilon": self.config.norm_eps} if "Norm" in op else {}
        if OPS[op].defaults:
            further |= self.activation_bits
        *constants, steps = self.store(name, tiles)
        return self.graph.node(
            op,
            [*inputs, *constants, *last, steps],
            f"{name}.{op}",
            outputs=[output or f"{name}.{op}"],
            domain=DOMAIN,
            N=tiles.rows,
            K=tiles.columns,
            bits=tiles.bits,
            block=tiles.block,
            **further,
        )

    def store(self, name: str, tiles: Tiles) -> list[str]:
        """A matrix as constants; what is there under its name already, such as a tied table, is not stored again."""
        codes, scales, zeros, minima, steps = tiles.constants()
        return [
            self.graph.constant(f"{name}.codes", codes),
            self.graph.constant(f"{name}.scales", scales),
            self.graph.constant(f"{name}.zeros", zeros),
            self.graph.constant(f"{name}.minima", minima),
            self.graph.constant(f"{name}.steps", steps),
        ]

    def nothing(self) -> str:
        """A single zero: what an operator gets where nothing is added."""
        return self.graph.constant("nothing", np.zeros(1, np.float32))
