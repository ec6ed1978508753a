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

from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.bundle import LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.export.graph import Graph
from edgekit.export.stock import StockMatrix, stock_matrix
from edgekit.model.heads import Heads
from edgekit.model.rope import tables
from edgekit.weight import Dense, Factored, Floats, Quantized, Weight, concatenate, stored_parts

Apply = Callable[[str, Dense | Quantized, str], str]  # (name, matrix, input) -> output
STRIDE = 128  # positions between those whose rotary angles are stored


class Parts:
    """Adds nodes to `graph` for modules of `checkpoint`. Nodes are named by module path.

    Stock products with matrices that are stored in `integer_bits` multiply in integers (accuracy level 4), others in
    float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: Graph,
        *,
        integer_bits: Collection[int],
        exact_layers: Collection[int] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.decoder
        self.graph = graph
        self.integer_bits = integer_bits
        last = self.config.layers
        self.exact = tuple(f"model.layers.{index}." for index in exact_layers if index != last)
        self.exact += ("model.embed_tokens", "lm_head") if last in exact_layers else ()
        self.sums: set[str] = set()

    def rotary_tables(self, positions: int) -> None:
        """rotary.cos and rotary.sin, (positions, head_dim / 2).

        Long ones are not stored: onnxruntime makes them once, when it loads the graph, from those of every `STRIDE`-th
        position a and of the first positions b, by cos(a + b) = cos a cos b - sin a sin b and its like. That is 2 MB
        less of a small model's file at 8,192 positions; the values differ by 2**-22 at most.
        """
        graph = self.graph
        cosine, sine = tables(self.config.rope, self.config.head_dim, positions)
        if positions <= 2 * STRIDE:
            graph.constant("rotary.cos", cosine)
            graph.constant("rotary.sin", sine)
            return
        scale = np.float32(self.config.rope.attention_factor)
        for name, table in (("cos", cosine), ("sin", sine)):
            graph.constant(f"rotary.{name}_far", table[::STRIDE, None])
            graph.constant(f"rotary.{name}_near", table[None, :STRIDE] / scale)
        shape = graph.constant("rotary.shape", np.array([-1, cosine.shape[1]], np.int64))
        ends = [
            graph.constant(f"rotary.{name}", np.array([value], np.int64))
            for name, value in (("first", 0), ("end", positions), ("axis", 0))
        ]
        for name, (one, other, joined) in {
            "cos": (("cos_far", "cos_near"), ("sin_far", "sin_near"), "Sub"),
            "sin": (("sin_far", "cos_near"), ("cos_far", "sin_near"), "Add"),
        }.items():
            products = [
                graph.node("Mul", [f"rotary.{far}", f"rotary.{near}"], f"rotary.{name}.{far}")
                for far, near in (one, other)
            ]
            total = graph.node(joined, products, f"rotary.{name}.sum")
            flat = graph.node("Reshape", [total, shape], f"rotary.{name}.flat")
            graph.node("Slice", [flat, *ends], f"rotary.{name}.all", outputs=[f"rotary.{name}"])

    def rotary(self, prefix: str, heads: Heads) -> list[str]:
        """The tables that a layer's queries and keys turn by: the model's, or the columns of the pairs it has left."""
        if 2 * len(heads.pairs) == self.config.head_dim:
            return ["rotary.cos", "rotary.sin"]
        pairs = self.graph.constant(f"{prefix}.pairs", np.array(heads.pairs, np.int64))
        return [
            self.graph.node("Gather", [f"rotary.{name}", pairs], f"{prefix}.{name}", axis=1) for name in ("cos", "sin")
        ]

    def unpadded_values(self, prefix: str, mixed: str, heads: Heads) -> str:
        """What attention gives, without the channels that `edgekit.export.values` padded its values by."""
        if heads.value_size == heads.key_size:
            return mixed
        split = self.graph.constant(f"{prefix}.split", np.array([0, 0, heads.queries, heads.key_size], np.int64))
        flat = self.graph.constant("shape.flat", np.array([0, 0, -1], np.int64))
        apart = self.graph.node("Reshape", [mixed, split], f"{prefix}.apart")
        cut = self.slice(apart, 0, heads.value_size, axis=3, name=f"{prefix}.cut")
        return self.graph.node("Reshape", [cut, flat], f"{prefix}.joined")

    def embed(self, module: str) -> str:
        weight = self.checkpoint.weight(module)
        if not isinstance(weight, Quantized):
            table = self.graph.constant(f"{module}.weight", weight.dense())
            return self.graph.node("Gather", [table, "input_ids"], module, axis=0)
        matrix = self.store(module, weight)
        rows, blocks, width = matrix.codes.shape
        whole = blocks * matrix.block == matrix.columns
        if matrix.offsets is not None:
            padded = self.embed_with_offsets(module, matrix)
        else:
            codes = self.graph.same_bytes(f"{module}.table", f"{module}.codes", (rows, blocks * width))
            inputs = [codes, "input_ids", f"{module}.scales"]
            if matrix.zeros is not None:
                inputs.append(f"{module}.zeros")
            padded = self.graph.contrib(
                "GatherBlockQuantized",
                inputs,
                module,
                bits=matrix.bits,
                block_size=matrix.block,
                gather_axis=0,
                quantize_axis=1,
            )
        return padded if whole else self.slice(padded, 0, matrix.columns, axis=2, name=f"{module}.unpadded")

    def embed_with_offsets(self, module: str, matrix: StockMatrix) -> str:
        """Rows of a table by standard operators: scale * (code - middle) + offset."""
        graph = self.graph
        blocks = matrix.codes.shape[1]
        codes = graph.node("Gather", [f"{module}.codes", "input_ids"], f"{module}.row", axis=0)
        if matrix.bits == 4:
            fifteen = graph.constant("fifteen", np.array(15, np.uint8))
            four = graph.constant("four", np.array(4, np.uint8))
            last = graph.constant("rest", np.array([-1], np.int64))
            halves = [
                graph.node("BitwiseAnd", [codes, fifteen], f"{module}.low"),
                graph.node("BitShift", [codes, four], f"{module}.high", direction="RIGHT"),
            ]
            halves = [graph.node("Unsqueeze", [half, last], f"{half}.column") for half in halves]
            codes = graph.node("Concat", halves, f"{module}.pairs", axis=-1)
            shape = graph.constant(f"{module}.shape", np.array([1, -1, blocks, matrix.block], np.int64))
            codes = graph.node("Reshape", [codes, shape], f"{module}.row_codes")
        column = graph.constant("last_axis", np.array([3], np.int64))
        values = graph.node("Cast", [codes], f"{module}.values", to=TensorProto.FLOAT)
        middle = graph.constant(f"{module}.middle", np.array(1 << (matrix.bits - 1), np.float32))
        values = graph.node("Sub", [values, middle], f"{module}.from_middle")
        scales = graph.node("Gather", [f"{module}.scales", "input_ids"], f"{module}.row_scales", axis=0)
        values = graph.node(
            "Mul", [values, graph.node("Unsqueeze", [scales, column], f"{scales}.column")], f"{module}.scaled"
        )
        offsets = graph.node("Gather", [f"{module}.offsets", "input_ids"], f"{module}.columns", axis=1)
        offsets = graph.node("Transpose", [offsets], f"{module}.row_offsets", perm=[1, 2, 0])
        values = graph.node(
            "Add", [values, graph.node("Unsqueeze", [offsets, column], f"{offsets}.column")], f"{module}.sum"
        )
        flat = graph.constant("shape.joined", np.array([0, 0, -1], np.int64))
        return graph.node("Reshape", [values, flat], module)

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
        if isinstance(weight, Factored):
            product = self.factored(name, weight, x, self.factor)
            zero = self.graph.constant("nothing", np.zeros(1, np.float32))
            return self.graph.node("Add", [product, bias or zero], f"{name}.add", outputs=[output])
        table = self.graph.constant(f"{name}.weight", weight.values.T)
        if not bias:
            return self.graph.node("MatMul", [x, table], name, outputs=[output])
        product = self.graph.node("MatMul", [x, table], name, outputs=[f"{name}.product"])
        return self.graph.node("Add", [product, bias], f"{name}.add", outputs=[output])

    def factor(self, name: str, weight: Dense | Quantized, x: str) -> str:
        return self.apply(name, weight, x, bias="", output=name)

    def factored(self, module: str, weight: Factored, x: str, apply: Apply) -> str:
        """A product's factors, applied from the last to the first: see `edgekit.weight`.

        With t tokens, I the inputs of the sites still to come and O the outputs of those done, the state before factor
        k is (t, I, o_(k+1), O, i_k, c_k), of which a linear takes the last two axes.
        """
        parts = list(zip(stored_parts(module, weight), weight.sites, strict=True))
        if weight.is_low_rank:
            for (name, factor), _ in reversed(parts):
                x = apply(name, factor, x)
            return x
        graph = self.graph
        ahead, done, before = weight.shape[1], 1, 1  # I, O without o_(k+1), o_(k+1)
        for (name, factor), (o, i) in reversed(parts):
            bond, ahead = factor.shape[1] // i, ahead // i
            if done * before * bond > 1:
                x = self.turned(x, (-1, ahead, i, done, bond, before), (0, 1, 5, 3, 2, 4), f"{name}.in")
            done *= before
            rows = graph.constant(f"{name}.rows", np.array([1, -1, i * bond], np.int64))
            x = apply(name, factor, graph.node("Reshape", [x, rows], f"{name}.flat"))
            before = o
        x = self.turned(x, (-1, done, before), (0, 2, 1), f"{module}.out")
        shape = graph.constant(f"{module}.shape", np.array([1, -1, weight.shape[0]], np.int64))
        return graph.node("Reshape", [x, shape], f"{module}.product")

    def turned(self, x: str, shape: Sequence[int], order: Sequence[int], name: str) -> str:
        """x in another shape, its axes in another order."""
        wanted = self.graph.constant(f"{name}.axes", np.array(shape, np.int64))
        return self.graph.node(
            "Transpose", [self.graph.node("Reshape", [x, wanted], f"{name}.apart")], name, perm=order
        )

    def quantized(self, module: str, weight: Quantized, x: str, *, bias: str, name: str, output: str) -> str:
        matrix = self.store(module, weight)
        product = self.graph.contrib(
            "MatMulNBits",
            [x, f"{module}.codes", f"{module}.scales", "" if matrix.zeros is None else f"{module}.zeros", "", bias],
            name if matrix.offsets is None else f"{name}.from_middle",
            outputs=[output] if matrix.offsets is None else [f"{output}.from_middle"],
            K=matrix.columns,
            N=weight.shape[0],
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=4 if matrix.bits in self.integer_bits and not module.startswith(self.exact) else 0,
        )
        if matrix.offsets is None:
            return product
        share = self.graph.node("MatMul", [self.block_sums(x, matrix), f"{module}.offsets"], f"{name}.share")
        return self.graph.node("Add", [product, share], name, outputs=[output])

    def block_sums(self, x: str, matrix: StockMatrix) -> str:
        """The sums of x over each block of columns, made once for all matrices that read x."""
        name = f"{x}.sums{matrix.block}"
        if name in self.sums:
            return name
        self.sums.add(name)
        graph = self.graph
        padding = -matrix.columns % matrix.block
        if padding:
            pads = graph.constant(f"{name}.pads", np.array([0, padding], np.int64))
            last = graph.constant("rest", np.array([-1], np.int64))
            x = graph.node("Pad", [x, pads, "", last], f"{name}.padded")
        shape = graph.constant(f"shape.blocks{matrix.block}", np.array([0, 0, -1, matrix.block], np.int64))
        axis = graph.constant("rest", np.array([-1], np.int64))
        return graph.node("ReduceSum", [graph.node("Reshape", [x, shape], f"{name}.blocks"), axis], name, keepdims=0)

    def store(self, module: str, weight: Quantized) -> StockMatrix:
        """A matrix as constants; what is there under its name already, such as a tied table, is not stored again."""
        matrix = stock_matrix(weight)
        self.graph.constant(f"{module}.codes", matrix.codes)
        self.graph.constant(f"{module}.scales", matrix.scales)
        if matrix.zeros is not None:
            self.graph.constant(f"{module}.zeros", matrix.zeros)
        if matrix.offsets is not None:
            self.graph.constant(f"{module}.offsets", matrix.offsets)
        return matrix

    def norm(self, module: str) -> str:
        return self.graph.constant(f"{module}.weight", self.checkpoint.vector(f"{module}.weight"))

    def slice(self, x: str, start: int, end: int, *, axis: int, name: str) -> str:
        bounds = [np.array([value], np.int64) for value in (start, end, axis)]
        names = [self.graph.constant(f"{name}.{key}", b) for key, b in zip(("from", "to", "axis"), bounds, strict=True)]
        return self.graph.node("Slice", [x, *names], name)

    def signature(
        self, caches: Sequence[LayerCache], *, cache_type: int, together: int = 1
    ) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """The graph's inputs and outputs; `cache_type` is the element type of keys and values, of which one holds as
        many channels as there are `together`.
        """
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, []),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "kept", self.config.vocabulary])]
        for index, cache in enumerate(caches):
            for part in ("key", "value"):
                dims = [1, cache.kv_heads, "cache", cache.head_dim // together]
                past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
                inputs.append(helper.make_tensor_value_info(past, cache_type, dims))
                outputs.append(helper.make_tensor_value_info(present, cache_type, dims))
        return inputs, outputs
