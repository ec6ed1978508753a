"""The encoder as accelerators want it: fixed shapes, standard operators, one text of up to T tokens.

input_ids (1, T) int64       a text's tokens, padded
mask (1, 1, 1, T)            0 where there is a token, -`hidden` where there is padding
states (1, T, hidden) float32

What is rounded, and how, is `edgekit.export.rounded`'s. What the graph means is `edgekit.model.encoder_reference`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from edgekit.checkpoint import Checkpoint
from edgekit.export.encoder import position_table
from edgekit.export.graph import Graph
from edgekit.export.rounded import RoundedGraph, Rounding, Tensor
from edgekit.model.encoder_config import EncoderConfig, encoder_config


def build_static_encoder(
    checkpoint: Checkpoint, graph: Graph, *, tokens: int, rounding: Rounding, file: str, observe: bool = False
) -> None:
    """Save the graph of one text of `tokens` tokens as `file`.

    With `observe` it also gives `low` and `high`, the least and the largest value of each tensor of
    `rounding.observed`.
    """
    _StaticEncoder(checkpoint, graph, rounding, encoder_config(checkpoint.config), tokens).build(file, observe=observe)


@dataclass
class _StaticEncoder(RoundedGraph):
    config: EncoderConfig
    tokens: int

    def build(self, file: str, *, observe: bool) -> None:
        self.rounding.observed.clear()
        self.mask = self.rounded("mask")
        state = self.embed()
        for index in range(self.config.layers):
            layer = f"model.layers.{index}"
            mixed = self.op("Add", [self.attention(f"{layer}.self_attn", state), state], f"{layer}.attended")
            state = self.layer_norm(mixed, f"{layer}.attention_norm")
            wide = self.op("Gelu", [self.matrix(f"{layer}.mlp.up_proj", state)], f"{layer}.mlp.active")
            grown = self.op("Add", [self.matrix(f"{layer}.mlp.down_proj", wide), state], f"{layer}.grown")
            state = self.layer_norm(grown, f"{layer}.output_norm")
        self.graph.node("Identity", [state.name], "states.named", outputs=["states"])
        info, T = helper.make_tensor_value_info, self.tokens
        inputs = [info("input_ids", TensorProto.INT64, [1, T]), info("mask", TensorProto.FLOAT, [1, 1, 1, T])]
        outputs = [info("states", TensorProto.FLOAT, [1, T, self.config.hidden_size])]
        if observe:
            for kind, output in (("ReduceMin", "low"), ("ReduceMax", "high")):
                self.extremes(kind, output, self.rounding.observed)
                outputs.append(info(output, TensorProto.FLOAT, [len(self.rounding.observed), None]))
        self.graph.save(inputs, outputs, title=self.config.architecture, file=file)

    def embed(self) -> Tensor:
        module = "model.embed_tokens"
        words = self.rounded(self.look_up(module))
        rows = position_table(self.checkpoint, self.config)[None, : self.tokens]
        summed = self.op("Add", [words, self.vector(f"{module}.positions_used", rows)], f"{module}.sum")
        return self.layer_norm(summed, f"{module}.norm")

    def look_up(self, module: str) -> str:
        """Rows of the table, which is stored in 8 bits with a scale for each row."""
        W = self.checkpoint.weight(module).dense()
        widths = np.maximum(np.abs(W).max(1, keepdims=True), 1e-12).astype(np.float32) / np.float32(127)
        codes = self.graph.constant(f"{module}.int8", np.rint(W / widths).astype(np.int8))
        steps = self.graph.constant(f"{module}.steps", widths)
        found = [self.graph.node("Gather", [table, "input_ids"], f"{table}.rows", axis=0) for table in (codes, steps)]
        values = self.graph.node("Cast", found[:1], f"{module}.values", to=TensorProto.FLOAT)
        return self.graph.node("Mul", [values, found[1]], module)

    def attention(self, prefix: str, x: Tensor) -> Tensor:
        width, T = self.config.head_dim, self.tokens
        query = self.heads(self.matrix(f"{prefix}.q_proj", x, scale=width**-0.5))
        key, value = (self.heads(self.matrix(f"{prefix}.{part}_proj", x)) for part in "kv")
        turned = self.move("Transpose", [key], f"{prefix}.keys", perm=[0, 1, 3, 2])
        scores = self.op("MatMul", [query, turned], f"{prefix}.scores")
        masked = self.op("Add", [scores, self.mask], f"{prefix}.masked")
        shares = self.op("Softmax", [masked], f"{prefix}.shares", axis=-1)
        mixed = self.op("MatMul", [shares, value], f"{prefix}.mixed")
        mixed = self.move("Transpose", [mixed], f"{prefix}.mixed.by_token", perm=[0, 2, 1, 3])
        return self.matrix(f"{prefix}.o_proj", self.reshape(mixed, (1, T, -1), f"{prefix}.mixed.flat"))

    def heads(self, x: Tensor) -> Tensor:
        """(1, T, hidden) to (1, heads, T, head_dim)."""
        apart = self.reshape(x, (1, self.tokens, self.config.heads, self.config.head_dim), f"{x.range}.apart")
        return self.move("Transpose", [apart], f"{x.range}.heads", perm=[0, 2, 1, 3])

    def layer_norm(self, x: Tensor, module: str) -> Tensor:
        parts = [
            self.vector(f"{module}.{leaf}", self.checkpoint.vector(f"{module}.{leaf}")) for leaf in ("weight", "bias")
        ]
        return self.op("LayerNormalization", [x, *parts], module, axis=-1, epsilon=self.config.norm_eps)
