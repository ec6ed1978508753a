"""The decoder as accelerators want it: fixed shapes, standard operators, 8-bit weights, a cache that the host fills.

input_ids (1, T) int64              T tokens: a prompt's piece, padded, or one
positions (T,) int64                where each stands in the sequence
mask (1, 1, T, S + T)               0 where a token may look, -`hidden` where not
past.i.{key,value} (1, kv_heads, S, head_dim)   what is in the cache of layer i; what lies behind its end is masked
logits (1, T, vocabulary) float32
new.i.{key,value} (1, kv_heads, T, head_dim)    for the host to put into the cache

RMSNorm is an L2 norm and a product; what is rounded, and how, is `edgekit.export.rounded`'s, and so is the cache:

    x / rms(x) * w = x / |x| * sqrt(n) w        the epsilon is left out, which matters where rms(x) is near its root

In the stream that layers add to, a few channels of a few tokens are thousands of times the others (Sun et al., arXiv
2402.17762), and a range that holds them leaves the others no steps. So channel c of the stream holds x_c / d_c, which
the scales of the rows of o_proj and down_proj make for nothing; only norms read d_c (x_c / d_c) in the wide range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.export.graph import Graph
from edgekit.export.parts import Parts
from edgekit.export.rounded import RoundedGraph, Rounding, Tensor
from edgekit.model.rope import tables


def build_static(
    checkpoint: Checkpoint,
    graph: Graph,
    caches: Sequence[LayerCache],
    *,
    tokens: int,
    context: int,
    rounding: Rounding,
    file: str,
    observe: bool = False,
) -> None:
    """Save the graph of `tokens` tokens after up to `context` cached ones as `file`.

    Graphs of other lengths may share `graph`: the weights are stored once. With `observe` the graph also gives
    `low` and `high`, the least and the largest value of each tensor of `rounding.observed`, and `stream.low` and
    `stream.high`, those of each channel of `rounding.stream`.
    """
    _Static(checkpoint, graph, rounding, caches, tokens, context).build(file, observe=observe)


@dataclass
class _Static(RoundedGraph):
    caches: Sequence[LayerCache]
    tokens: int
    context: int

    def build(self, file: str, *, observe: bool) -> None:
        self.rounding.observed.clear()
        self.rounding.stream.clear()
        config = self.checkpoint.decoder
        self.mask = self.rounded("mask")
        self.cosine, self.sine = self.angles()
        state = self.embed()
        for index, cache in enumerate(self.caches):
            layer = f"model.layers.{index}"
            mixed = self.attention(
                f"{layer}.self_attn", self.stream_norm(state, f"{layer}.input_layernorm"), index, cache
            )
            state = self.in_stream(self.op("Add", [state, mixed], f"{layer}.attended"))
            grown = self.mlp(f"{layer}.mlp", self.stream_norm(state, f"{layer}.post_attention_layernorm"))
            state = self.in_stream(self.op("Add", [state, grown], f"{layer}.output"))
        head = "model.embed_tokens" if config.tied else "lm_head"
        logits = self.matrix(head, self.stream_norm(state, "model.norm"), name="logits.product")
        self.graph.node("Identity", [logits.name], "logits.named", outputs=["logits"])
        if observe:
            for kind, output in (("ReduceMin", "low"), ("ReduceMax", "high")):
                self.extremes(kind, output, self.rounding.observed)
                self.extremes(kind, f"stream.{output}", self.rounding.stream)
        self.graph.save(*self.signature(observe=observe), title=config.architecture, file=file)

    def embed(self) -> Tensor:
        name = Parts(self.checkpoint, self.graph, integer_bits=()).embed("model.embed_tokens")
        if self.rounding.divisors is not None:
            parts = self.graph.constant("stream.parts", 1 / self.rounding.divisors)
            name = self.graph.node("Mul", [name, parts], f"{name}.divided")
        return self.in_stream(self.rounded(name))

    def in_stream(self, x: Tensor) -> Tensor:
        self.rounding.stream.append(x.range)
        return x

    def stream_norm(self, x: Tensor, module: str) -> Tensor:
        self.rounding.norms[module] = x.range
        if self.rounding.divisors is not None:
            x = self.op("Mul", [x, self.vector(f"{module}.divisors", self.rounding.divisors)], f"{module}.whole")
        return self.norm(x, module)

    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, (1, 1, T, head_dim); the first half of the sine is negated."""
        cosine, sine = tables(self.checkpoint.decoder.rope, self.checkpoint.decoder.head_dim, self.context)
        both = {"cosine": np.concatenate([cosine, cosine], 1), "sine": np.concatenate([-sine, sine], 1)}
        shape = self.integers(1, 1, self.tokens, -1)
        found = []
        for name, table in both.items():
            rows = self.graph.node("Gather", [self.graph.constant(f"{name}.table", table), "positions"], f"{name}.rows")
            found.append(self.rounded(self.graph.node("Reshape", [rows, shape], name)))
        return found[0], found[1]

    def attention(self, prefix: str, x: Tensor, index: int, cache: LayerCache) -> Tensor:
        width, heads, T = cache.head_dim, cache.kv_heads, self.tokens
        rows = (
            self.checkpoint.shape(f"{prefix}.q_proj")[0] // width // heads * T
        )  # of the queries that share a key head
        scale, normed = width**-0.5, self.checkpoint.has(f"{prefix}.q_norm")
        query = self.heads(self.matrix(f"{prefix}.q_proj", x, scale=1.0 if normed else scale), width)
        key, value = (self.heads(self.matrix(f"{prefix}.{part}_proj", x), width) for part in "kv")
        if normed:
            query = self.norm(query, f"{prefix}.q_norm", scale=scale)
            key = self.norm(key, f"{prefix}.k_norm")
        query, key = self.turn(query, width, f"{prefix}.query"), self.turn(key, width, f"{prefix}.key")
        query = self.reshape(query, (1, heads, rows, width), f"{prefix}.query.rows")
        keys, values = self.cached(f"{index}.key", key), self.cached(f"{index}.value", value)
        turned = self.move("Transpose", [keys], f"{prefix}.keys", perm=[0, 1, 3, 2])
        scores = self.op("MatMul", [query, turned], f"{prefix}.scores")
        scores = self.reshape(scores, (1, -1, T, self.context + T), f"{prefix}.scores.by_head")
        masked = self.op("Add", [scores, self.mask], f"{prefix}.masked")
        shares = self.op("Softmax", [masked], f"{prefix}.shares", axis=-1)
        shares = self.reshape(shares, (1, heads, rows, self.context + T), f"{prefix}.shares.rows")
        mixed = self.op("MatMul", [shares, values], f"{prefix}.mixed")
        mixed = self.reshape(mixed, (1, -1, T, width), f"{prefix}.mixed.by_head")
        mixed = self.move("Transpose", [mixed], f"{prefix}.mixed.by_token", perm=[0, 2, 1, 3])
        return self.to_stream(f"{prefix}.o_proj", self.reshape(mixed, (1, T, -1), f"{prefix}.mixed.flat"))

    def heads(self, x: Tensor, width: int) -> Tensor:
        """(1, T, heads * width) to (1, heads, T, width)."""
        apart = self.reshape(x, (1, self.tokens, -1, width), f"{x.range}.apart")
        return self.move("Transpose", [apart], f"{x.range}.heads", perm=[0, 2, 1, 3])

    def turn(self, x: Tensor, width: int, name: str) -> Tensor:
        """x * cosine + (second half, first half) * sine, the first half of the sine being negated."""
        halves = []
        for half, start in (("first", 0), ("second", width // 2)):
            bounds = [self.integers(number) for number in (start, start + width // 2, 3)]
            halves.append(self.move("Slice", [x], f"{name}.{half}", bounds))
        swapped = self.move("Concat", halves[::-1], f"{name}.swapped", axis=3)
        straight = self.op("Mul", [x, self.cosine], f"{name}.straight")
        crossed = self.op("Mul", [swapped, self.sine], f"{name}.crossed")
        return self.op("Add", [straight, crossed], f"{name}.turned")

    def cached(self, name: str, x: Tensor) -> Tensor:
        """The cache with the new tokens behind it. They become an output as they are to be cached: as codes, or floats.

        The cache shares the new ones' range.
        """
        self.graph.node("Identity", [x.codes or x.name], f"new.{name}.named", outputs=[f"new.{name}"])
        past = f"past.{name}"
        if x.codes:
            past = self.graph.node("DequantizeLinear", [past, *self.encoding(x.range)], f"{past}.rounded")
        return self.move("Concat", [Tensor(past, x.range), x], f"{name}.all", axis=2)

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self.matrix(f"{prefix}.gate_proj", x), self.matrix(f"{prefix}.up_proj", x)
        active = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{prefix}.open")], f"{prefix}.active")
        return self.to_stream(f"{prefix}.down_proj", self.op("Mul", [active, up], f"{prefix}.gated"))

    def norm(self, x: Tensor, module: str, *, scale: float = 1.0) -> Tensor:
        weight = self.checkpoint.vector(f"{module}.weight")
        direction = self.op("LpNormalization", [x], f"{module}.direction", axis=-1, p=2)
        factor = weight * np.float32(scale * len(weight) ** 0.5)
        return self.op("Mul", [direction, self.vector(f"{module}.factor", factor)], module)

    def to_stream(self, module: str, x: Tensor) -> Tensor:
        return self.in_stream(self.matrix(module, x, divisors=self.rounding.divisors))

    def signature(self, *, observe: bool) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        T = self.tokens
        info = helper.make_tensor_value_info
        kind = TensorProto.FLOAT if self.rounding.ranges is None else TensorProto.UINT16
        inputs = [
            info("input_ids", TensorProto.INT64, [1, T]),
            info("positions", TensorProto.INT64, [T]),
            info("mask", TensorProto.FLOAT, [1, 1, T, self.context + T]),
        ]
        outputs = [info("logits", TensorProto.FLOAT, [1, T, self.checkpoint.decoder.vocabulary])]
        for index, cache in enumerate(self.caches):
            for part in ("key", "value"):
                shapes = [[1, cache.kv_heads, length, cache.head_dim] for length in (self.context, T)]
                inputs.append(info(f"past.{index}.{part}", kind, shapes[0]))
                outputs.append(info(f"new.{index}.{part}", kind, shapes[1]))
        for name, count in (("", len(self.rounding.observed)), ("stream.", len(self.rounding.stream))):
            if observe:
                outputs += [info(f"{name}{end}", TensorProto.FLOAT, [count, None]) for end in ("low", "high")]
        return inputs, outputs
