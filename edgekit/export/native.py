"""The decoder graph over our own operators: five nodes a layer.

    QuantLinear   norm, then q, k and v in one matrix
    Attention     rotary embedding, cache append in place, exact attention over a float16 cache
    QuantLinear   output projection, plus the residual
    QuantLinear   norm, then gate and up, then silu(gate) * up
    QuantLinear   down projection, plus the residual

Weights lie in tiles as the kernels read them, so they are mapped and never copied. Inputs and outputs are those of
`edgekit.export.decoder`, but for the cache's type. A matrix that is not quantised stays a MatMul.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.export.decoder import Decoder, concatenate
from edgekit.export.graph import Graph
from edgekit.kernels.opset import DOMAIN
from edgekit.kernels.pack import LANES, Tiles, interleave, tile
from edgekit.weight import Quantized, Weight

OFFSETS = {"none": 0, "zero point": 1, "minimum": 2}


def build_native_decoder(checkpoint: Checkpoint, folder: Path, *, context: int) -> list[LayerCache]:
    """Write model.onnx and its weights into `folder`; returns the layers' cache shapes."""
    with Graph(folder) as graph:
        return _NativeDecoder(checkpoint, graph, context).build()


class _NativeDecoder(Decoder):
    """Nodes differ from the stock graph's, the order of things does not."""

    cache_type = np.float16

    def __init__(self, checkpoint: Checkpoint, graph: Graph, context: int) -> None:
        super().__init__(checkpoint, graph, context, accuracy_level=4)

    def build(self) -> list[LayerCache]:
        graph = self.graph
        self.rotary_tables()
        state = self.embed("model.embed_tokens")
        shapes = []
        for index in range(self.config.layers):
            prefix = f"model.layers.{index}"
            mixed, shape = self.attention(f"{prefix}.self_attn", state, index)
            shapes.append(shape)
            state = self.fused([f"{prefix}.self_attn.o_proj"], mixed, residual=state)
            gated = self.fused(
                [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"],
                state,
                norm=f"{prefix}.post_attention_layernorm",
                gated=True,
            )
            state = self.fused([f"{prefix}.mlp.down_proj"], gated, residual=state)
        self.head(state)
        graph.save(*self.signature(shapes), title=self.config.architecture)
        return shapes

    def embed(self, module: str) -> str:
        weight = self.checkpoint.weight(module)
        if not isinstance(weight, Quantized):
            return super().embed(module)
        tiles = tile(weight)
        inputs = ["input_ids", *self.store_tiles(module, tiles)]
        return self.graph.node("QuantEmbedding", inputs, module, domain=DOMAIN, **attributes(tiles))

    def attention(self, prefix: str, state: str, index: int) -> tuple[str, LayerCache]:
        heads, kv_heads = self.head_counts(prefix)
        width = self.config.head_dim
        modules = [f"{prefix}.{name}_proj" for name in "qkv"]
        qkv = self.fused(modules, state, norm=f"model.layers.{index}.input_layernorm")
        norms = [f"{prefix}.{name}_norm" for name in "qk"]
        normed = [self.norm(norm) for norm in norms if self.checkpoint.has(norm)]
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        mixed = self.graph.node(
            "Attention",
            [qkv, *past, "seqlens_k", "rotary.cos", "rotary.sin", *normed],
            prefix,
            outputs=[prefix, f"present.{index}.key", f"present.{index}.value"],
            domain=DOMAIN,
            num_heads=heads,
            kv_num_heads=kv_heads,
            head_dim=width,
            local_window_size=self.config.sliding_window or -1,
            epsilon=self.config.norm_eps,
        )
        return mixed, LayerCache(kv_heads, width)

    def head(self, state: str) -> None:
        kept = self.keep_last(state)
        module = "model.embed_tokens" if self.config.tied else "lm_head"
        if isinstance(self.checkpoint.weight(module), Quantized):
            self.fused([module], kept, norm="model.norm", output="logits")
            return
        self.dense_head(self.normed(kept, "model.norm"))

    def fused(
        self,
        modules: Sequence[str],
        x: str,
        *,
        norm: str = "",
        residual: str = "",
        gated: bool = False,
        output: str = "",
    ) -> str:
        """The matrices of `modules`, which read the same input, with what stands before and after them.

        One QuantLinear where they are quantised alike, else standard nodes that compute the same.
        """
        weights = [self.checkpoint.weight(module) for module in modules]
        joined = concatenate(weights)
        name = modules[0] if len(modules) == 1 else f"{modules[0].rpartition('.')[0]}.{'gate_up' if gated else 'qkv'}"
        biased = any(self.checkpoint.has(f"{module}.bias") for module in modules)
        if not isinstance(joined, Quantized) or (gated and biased):
            return self.composed(modules, x, name=name, norm=norm, residual=residual, gated=gated, output=output)
        tiles = interleave(*map(tile, _quantized(weights))) if gated else tile(joined)
        bias = self.joined_bias(modules, weights, f"{name}.bias") if biased else ""
        inputs = [x, *self.store_tiles(name, tiles), self.norm(norm) if norm else "", bias, residual]
        return self.graph.node(
            "QuantLinear",
            inputs,
            f"{name}.linear",
            outputs=[output or f"{name}.out"],
            domain=DOMAIN,
            gated=int(gated),
            epsilon=self.config.norm_eps,
            **attributes(tiles),
        )

    def composed(
        self, modules: Sequence[str], x: str, *, name: str, norm: str, residual: str, gated: bool, output: str
    ) -> str:
        """The same by standard nodes and one product a matrix."""
        normed = self.normed(x, norm) if norm else x
        parts = [
            self.linear(module, normed)
            if not isinstance(self.checkpoint.weight(module), Quantized)
            else self.fused([module], normed)
            for module in modules
        ]
        if gated:
            active = self.graph.contrib("QuickGelu", [parts[0]], f"{name}.act", alpha=1.0)
            value = self.graph.node("Mul", [active, parts[1]], f"{name}.gated")
        else:
            value = parts[0] if len(parts) == 1 else self.graph.node("Concat", parts, f"{name}.joined", axis=-1)
        if residual:
            value = self.graph.node("Add", [value, residual], f"{name}.residual")
        return self.graph.node("Identity", [value], f"{name}.named", outputs=[output]) if output else value

    def normed(self, x: str, module: str) -> str:
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, self.norm(module)], module, epsilon=self.config.norm_eps, axis=-1
        )

    def store_tiles(self, name: str, tiles: Tiles) -> list[str]:
        stored = [
            self.graph.constant(f"{name}.codes", tiles.codes),
            self.graph.constant(f"{name}.scales", tiles.scales),
        ]
        stored.append("" if tiles.offsets is None else self.graph.constant(f"{name}.offsets", tiles.offsets))
        return stored


def attributes(tiles: Tiles) -> dict[str, int]:
    """The attributes that describe a matrix to a kernel."""
    kind = "none" if tiles.offsets is None else "zero point" if tiles.offsets.dtype == np.uint8 else "minimum"
    return {
        "N": tiles.rows,
        "K": tiles.columns,
        "bits": tiles.bits,
        "block": tiles.block,
        "offset": OFFSETS[kind],
    }


def supports(checkpoint: Checkpoint) -> bool:
    """Whether the native operators can run this model: quantised, with heads that fill whole vectors."""
    return bool(checkpoint.structure) and checkpoint.decoder.head_dim % LANES == 0


def _quantized(weights: Sequence[Weight]) -> list[Quantized]:
    return [weight for weight in weights if isinstance(weight, Quantized)]
