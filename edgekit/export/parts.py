"""What every decoder graph is made of: norms, matrices, the ends of the graph and its signature.

input_ids (1, T) int64        the tokens to append
seqlens_k (1,) int32          the index of the last of them in the sequence
total_sequence_length () int32
logits_to_keep () int64       how many of the last tokens get logits
past_key_values.i.{key,value} (1, kv_heads, S, head_dim), the cache of layer i
logits (1, K, vocabulary) float32; present.i.{key,value}, which may be the very buffers of the past: then the cache
grows in place, up to S tokens
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.export.graph import Graph
from edgekit.model.rope import tables
from edgekit.weight import Dense, Floats, Quantized, Weight, concatenate


class Parts:
    """Adds nodes to `graph` for modules of `checkpoint`. Nodes are named by module path.

    Stock products with matrices of `integer_bits` multiply in integers (accuracy level 4), others in float32.
    """

    def __init__(self, checkpoint: Checkpoint, graph: Graph, *, integer_bits: Collection[int]) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.decoder
        self.graph = graph
        self.integer_bits = integer_bits

    def rotary_tables(self, positions: int) -> None:
        """The constants rotary.cos and rotary.sin, (positions, head_dim / 2)."""
        cosine, sine = tables(self.config.rope, self.config.head_dim, positions)
        self.graph.constant("rotary.cos", cosine)
        self.graph.constant("rotary.sin", sine)

    def embed(self, module: str) -> str:
        weight = self.checkpoint.weight(module)
        if isinstance(weight, Dense) or weight.minima is not None:  # GatherBlockQuantized knows no minima
            table = self.graph.constant(f"{module}.weight", weight.dense())
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

    def keep_last(self, x: str) -> str:
        """The last `logits_to_keep` tokens of x."""
        graph = self.graph
        zero, axis = graph.constant("zero", np.array([0], np.int64)), graph.constant("one", np.array([1], np.int64))
        end = graph.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
        count = graph.node("Unsqueeze", ["logits_to_keep", zero], "keep.count")
        return graph.node("Slice", [x, graph.node("Neg", [count], "keep.start"), end, axis], "keep")

    def head(self, x: str) -> None:
        """The graph's logits, from normed states."""
        if not self.config.tied:
            self.linear("lm_head", x, output="logits")
            return
        module = "model.embed_tokens"
        weight = self.checkpoint.weight(module)
        if isinstance(weight, Quantized):
            self.quantized(module, weight, x, bias="", name="lm_head", output="logits")
            return
        # The table is stored once, as (vocabulary, hidden): Gemm reads it transposed, and wants a matrix.
        batch = self.graph.constant("zero", np.array([0], np.int64))
        flat = self.graph.node("Squeeze", [x, batch], "keep.flat")
        logits = self.graph.node("Gemm", [flat, f"{module}.weight"], "lm_head", transB=1)
        self.graph.node("Unsqueeze", [logits, batch], "lm_head.batch", outputs=["logits"])

    def normed(self, x: str, module: str) -> str:
        """RMSNorm of x over its last axis."""
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, self.norm(module)], module, epsilon=self.config.norm_eps, axis=-1
        )

    def linears(self, modules: Sequence[str], x: str, name: str) -> str | None:
        """Several matrices that read the same input as one, or None when they are not stored alike."""
        weights = [self.checkpoint.weight(module) for module in modules]
        joined = concatenate(weights)
        if joined is None:
            return None
        bias = self.joined_bias(modules)
        named = "" if bias is None else self.graph.constant(f"{name}.bias", bias)
        return self.apply(name, joined, x, bias=named, output=name)

    def linear(self, module: str, x: str, *, output: str = "") -> str:
        weight = self.checkpoint.weight(module)
        bias = self.joined_bias([module])
        named = "" if bias is None else self.graph.constant(f"{module}.bias", bias)
        return self.apply(module, weight, x, bias=named, output=output or module)

    def joined_bias(self, modules: Sequence[str]) -> Floats | None:
        """The biases of several matrices one after the other, zeros where one has none; None where none has."""
        if not any(self.checkpoint.has(f"{module}.bias") for module in modules):
            return None
        return np.concatenate([self.bias(module) for module in modules])

    def bias(self, module: str) -> Floats:
        rows = self.checkpoint.shape(module)[0]
        if not self.checkpoint.has(f"{module}.bias"):
            return np.zeros(rows, np.float32)
        bias = self.checkpoint.vector(f"{module}.bias")
        if bias.shape != (rows,):
            raise ModelError(
                f"a bias must have one value a row: {module}.bias has {bias.shape}, its matrix {rows} rows"
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
        zeros = f"{module}.zeros" if f"{module}.zeros" in self.graph else ""
        return self.graph.contrib(
            "MatMulNBits",
            [x, f"{module}.codes", f"{module}.scales", zeros, "", bias],
            name,
            outputs=[output],
            K=weight.columns,
            N=weight.shape[0],
            bits=weight.bits,
            block_size=weight.block,
            accuracy_level=4 if weight.bits in self.integer_bits else 0,
        )

    def store(self, module: str, weight: Quantized) -> None:
        self.graph.constant(f"{module}.codes", weight.codes)
        scales = weight.scales.astype(np.float32)
        if weight.minima is not None:
            # s * q + m = s * (q - z) with the float zero point z = -m / s. A block without a scale has codes of zero,
            # and is m * (0 + 1).
            minima = weight.minima.astype(np.float32)
            flat = scales == 0
            scales = np.where(flat, minima, scales)
            zeros = np.where(flat, np.float32(-1), -minima / np.where(scales == 0, np.float32(1), scales))
            self.graph.constant(f"{module}.zeros", zeros)
        elif weight.zeros is not None:
            self.graph.constant(f"{module}.zeros", weight.zeros)
        self.graph.constant(f"{module}.scales", scales)

    def norm(self, module: str) -> str:
        return self.graph.constant(f"{module}.weight", self.checkpoint.vector(f"{module}.weight"))

    def slice(self, x: str, start: int, end: int, *, axis: int, name: str) -> str:
        bounds = [np.array([value], np.int64) for value in (start, end, axis)]
        names = [self.graph.constant(f"{name}.{key}", b) for key, b in zip(("from", "to", "axis"), bounds, strict=True)]
        return self.graph.node("Slice", [x, *names], name)

    def signature(
        self, caches: Sequence[LayerCache], *, cache_type: int
    ) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """The graph's inputs and outputs; `cache_type` is the element type of keys and values."""
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
                inputs.append(helper.make_tensor_value_info(past, cache_type, dims))
                outputs.append(helper.make_tensor_value_info(present, cache_type, dims))
        return inputs, outputs
