"""Nodes of our operators with random weights and inputs: what the tests of kernels and of function bodies run.

Weights are random bytes, padding included, so that nothing rests on what a quantiser would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit import cache_rows
from edgekit.kernels import attention, reference
from edgekit.kernels.library import choose_path, known_paths, library_path, path_name, register
from edgekit.kernels.opset import DOMAIN, OPS, VERSION
from edgekit.kernels.pack import Tiles, interleave, tile
from edgekit.weight import Floats, Quantized, pack

needs_library = pytest.mark.skipif(
    library_path() is None, reason="no kernel library: build it (see CMakeLists.txt) or name one by EDGEKIT_KERNELS"
)

Array = NDArray[Any]
Offsets = Literal["symmetric", "zeros", "minima"]
Scales = Literal["float16", "int8"]

REFERENCE = {
    "QuantLinear": reference.quant_linear,
    "NormQuantLinear": reference.norm_quant_linear,
    "GatedNormQuantLinear": reference.gated_norm_quant_linear,
    "QuantEmbedding": reference.quant_embedding,
    "Attention": attention.attention,
    "NormAttention": attention.norm_attention,
    "AttentionInt8": attention.attention_whole,
    "NormAttentionInt8": attention.norm_attention_whole,
    "AttentionInt4": attention.attention_whole,
    "NormAttentionInt4": attention.norm_attention_whole,
    "HadamardSparseAttention": attention.hadamard_sparse_attention,
    "HadamardSparseAttentionInt8": attention.hadamard_sparse_attention_int8,
}


@dataclass(frozen=True)
class Case:
    """One node: what the model holds, what is fed, and its attributes."""

    op: str
    constants: dict[str, Array]
    inputs: dict[str, Array]
    attributes: dict[str, Any]

    def reference(self, **mode: Any) -> list[Array]:
        """The outputs by definition."""
        given = {**self.constants, **self.inputs}
        result: Any = REFERENCE[self.op](*(given[name] for name in OPS[self.op].inputs), **self.attributes, **mode)  # type: ignore[operator]
        return list(result) if isinstance(result, tuple) else [result]

    def changed(self, **values: Any) -> Case:
        """The case with other constants, inputs or attributes; None takes one away."""

        def merged(old: dict[str, Any]) -> dict[str, Any]:
            new = {name: values.get(name, value) for name, value in old.items()}
            return {name: value for name, value in new.items() if value is not None}

        return replace(
            self,
            constants=merged(self.constants),
            inputs=merged(self.inputs),
            attributes=merged(self.attributes),
        )

    def model(self, functions: Sequence[onnx.FunctionProto] = ()) -> onnx.ModelProto:
        """A model of this node alone."""
        op = OPS[self.op]
        fed = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), [None] * values.ndim)
            for name, values in self.inputs.items()
        ]
        kinds = {
            name: helper.np_dtype_to_tensor_dtype(self.inputs[name.replace("present", "past")].dtype)
            for name in op.outputs
            if name != "y"
        }
        made = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in op.outputs]
        node = helper.make_node(op.name, op.inputs, op.outputs, domain=DOMAIN, **self.attributes)
        held = [numpy_helper.from_array(values, name) for name, values in self.constants.items()]
        graph = helper.make_graph([node], "case", fed, made, initializer=held)
        opsets = {"": 21, "com.microsoft": 1, DOMAIN: VERSION}
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            functions=functions,
            ir_version=10,
        )


def open_session(
    model: onnx.ModelProto | Path, *, native: bool, threads: int = 1, activations: Literal[8, 15] = 15
) -> ort.InferenceSession:
    """The model with or without the kernel library, which must be there if `native`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        assert register(options, decode_threads=threads, prefill_threads=threads, activations=activations)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_natively(case: Case, *, threads: int = 1) -> list[Array]:
    outputs: list[Array] = open_session(case.model(), native=True, threads=threads).run(None, case.inputs)
    return outputs


def run_in_place(session: ort.InferenceSession, case: Case) -> list[Array]:
    """The outputs of attention, with one buffer as past and as present of each part of the cache."""
    buffers = {name: values.copy() for name, values in case.inputs.items()}  # OrtValues only point to them
    held = {name: ort.OrtValue.ortvalue_from_numpy(values) for name, values in buffers.items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    kept = [name for name in OPS[case.op].outputs if name != "y"]
    for name in kept:
        binding.bind_ortvalue_output(name, held[name.replace("present", "past")])
    session.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy(), *(buffers[name.replace("present", "past")] for name in kept)]


def random_matrix(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int,
    block: int,
    offsets: Offsets,
    scales: Scales = "float16",
) -> Quantized:
    """Random codes, scales of both signs and sizes, and zero points or minima."""
    blocks = -(-columns // block)
    spread = rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-4, 1, (rows, blocks))
    weight = Quantized(
        rng.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        spread.astype(np.float16),
        pack(rng.integers(0, 1 << bits, (rows, blocks), np.uint8), bits) if offsets == "zeros" else None,
        bits=bits,
        block=block,
        columns=columns,
        minima=rng.standard_normal((rows, blocks)).astype(np.float16) if offsets == "minima" else None,
    )
    if scales == "float16":
        return weight
    steps = rng.uniform(0.5, 2, (rows, 1 if weight.minima is None else 2)) * 10.0 ** rng.integers(-6, -1, (rows, 1))
    return replace(
        weight,
        scales=rng.integers(0, 256, (rows, blocks), np.uint8),
        minima=None if weight.minima is None else rng.integers(-128, 128, (rows, blocks)).astype(np.int8),
        steps=steps.astype(np.float16),
    )


def native_mode(rows: int, path: str = "") -> reference.Activations:
    """How the kernels of a path round that many rows of activations."""
    if rows <= reference.FINE_ROWS:
        return "int16"
    return "bfloat16" if path == "amx" else "int8"


def steady_activations(
    rng: np.random.Generator, rows: int, columns: int, block: int, mode: Literal["int16", "int8"] | None = None
) -> Floats:
    """Rows whose codes no rounding error on the way can change: (1, rows, columns).

    Each block holds its peak and else numbers well away from the middle between two codes. Blocks differ in size; the
    second row and now and then a block are all zero.
    """
    blocks, steps = -(-columns // block), reference.STEPS[mode or native_mode(rows)]
    codes = rng.integers(1 - steps, steps, (rows, blocks, block)) + rng.uniform(-0.4, 0.4, (rows, blocks, block))
    codes[:, :, 0] = steps
    codes *= 10.0 ** rng.integers(-3, 2, (rows, blocks, 1))
    codes[rng.random((rows, blocks)) < 0.1] = 0
    codes[1:2] = 0
    return codes.reshape(1, rows, blocks * block)[:, :, :columns].astype(np.float32)


def matrix_case(
    op: str, tiles: Tiles, inputs: dict[str, Array], first: dict[str, Array], last: dict[str, Array], **attributes: Any
) -> Case:
    """A node over a matrix: its constants stand between `first` and `last`."""
    parts: dict[str, Array] = dict(zip(("codes", "scales", "zeros", "minima"), tiles.constants()[:4], strict=True))
    last = {**last, "steps": tiles.constants()[4]}
    sizes = {"N": tiles.rows, "K": tiles.columns, "bits": tiles.bits, "block": tiles.block}
    return Case(op, {**first, **parts, **last}, inputs, {**sizes, **attributes})


NOTHING = np.zeros(1, np.float32)
Extra = Literal["nothing", "bias", "residual", "both"]


def linear_case(
    N: int,
    K: int,
    *,
    bits: int = 4,
    block: int = 32,
    offsets: Offsets = "symmetric",
    scales: Scales = "float16",
    rows: int = 2,
    extra: Extra = "nothing",
    seed: int = 0,
) -> Case:
    """QuantLinear of ordinary random activations."""
    rng = np.random.default_rng(seed)
    tiles = tile(random_matrix(rng, N, K, bits=bits, block=block, offsets=offsets, scales=scales))
    inputs: dict[str, Array] = {"x": rng.standard_normal((1, rows, K)).astype(np.float32)}
    last = {"bias": NOTHING, "residual": NOTHING}
    if extra in ("bias", "both"):
        last["bias"] = rng.standard_normal(N).astype(np.float32)
    if extra in ("residual", "both"):
        del last["residual"]
        inputs["residual"] = rng.standard_normal((1, rows, N)).astype(np.float32)
    return matrix_case("QuantLinear", tiles, inputs, {}, last)


def norm_case(
    N: int,
    K: int,
    *,
    bits: int = 4,
    block: int = 32,
    offsets: Offsets = "symmetric",
    scales: Scales = "float16",
    rows: int = 2,
    biased: bool = False,
    gated: bool = False,
    seed: int = 0,
) -> Case:
    """NormQuantLinear, or GatedNormQuantLinear with N / 2 rows of gate."""
    rng = np.random.default_rng(seed)
    kind: dict[str, Any] = {"bits": bits, "block": block, "offsets": offsets, "scales": scales}
    norm = rng.uniform(0.5, 2, K).astype(np.float32) * rng.choice(np.array([-1, 1], np.float32), K)
    inputs: dict[str, Array] = {"x": steady_activations(rng, rows, K, block) / norm}
    if gated:
        halves = [tile(random_matrix(rng, N // 2, K, **kind)) for _ in range(2)]
        return matrix_case("GatedNormQuantLinear", interleave(*halves), inputs, {"norm": norm}, {}, epsilon=1e-5)
    tiles = tile(random_matrix(rng, N, K, **kind))
    bias = rng.standard_normal(N).astype(np.float32) if biased else NOTHING
    return matrix_case("NormQuantLinear", tiles, inputs, {"norm": norm}, {"bias": bias}, epsilon=1e-5)


def embedding_case(
    N: int,
    K: int,
    *,
    bits: int = 4,
    block: int = 32,
    offsets: Offsets = "symmetric",
    scales: Scales = "float16",
    tokens: int = 40,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)
    tiles = tile(random_matrix(rng, N, K, bits=bits, block=block, offsets=offsets, scales=scales))
    return matrix_case("QuantEmbedding", tiles, {"ids": rng.integers(0, N, (1, tokens))}, {}, {})


def attention_case(
    *,
    tokens: int,
    first: int = 0,
    kv_heads: int = 1,
    group: int = 1,
    head_dim: int = 16,
    window: int = -1,
    normed: bool = False,
    bits: Literal[16, 8, 4] = 16,
    spare: int = 5,
    seed: int = 0,
) -> Case:
    """`tokens` tokens from position `first` on; past the last of them the cache has `spare` places of NaN."""
    rng = np.random.default_rng(seed)
    heads, total = kv_heads * group, first + tokens
    past = rng.standard_normal((2, 1, kv_heads, total + spare, head_dim)).astype(np.float16)
    past[:, :, :, first:] = np.nan
    angles = np.arange(total + spare)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    fed = {
        "qkv": rng.standard_normal((1, tokens, (heads + 2 * kv_heads) * head_dim)).astype(np.float32),
        "past_key": past[0],
        "past_value": past[1],
        "last": np.array([total - 1], np.int32),
    }
    if bits < 16:
        fed |= whole_cache(past[0], past[1], bits)
    held = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    attributes |= {"head_dim": head_dim, "local_window_size": window}
    suffix = f"Int{bits}" if bits < 16 else ""
    if not normed:
        return Case(f"Attention{suffix}", held, fed, attributes)
    for name in ("q_norm", "k_norm"):
        held[name] = rng.uniform(0.5, 2, head_dim).astype(np.float32)
    return Case(f"NormAttention{suffix}", held, fed, {**attributes, "epsilon": 1e-6})


def whole_cache(keys: Array, values: Array, bits: Literal[8, 4]) -> dict[str, Array]:
    """A float16 cache (1, kv_heads, S, head_dim) in 8 or 4 bits, as inputs."""
    rows = [cache_rows.keep(part.astype(np.float32), bits) for part in (keys, values)]
    scales = np.concatenate([scales for _, scales in rows], axis=1)
    return {"past_key": rows[0][0], "past_value": rows[1][0], "past_scales": scales}


def every_path() -> Iterator[str]:
    """Chooses each path that this processor can run in turn, and the one that was chosen again at the end."""
    before = path_name()
    assert before
    try:
        for name in known_paths():
            choose_path(name)
            yield name
    finally:
        choose_path(before)


def assert_close(actual: Array, expected: Array, tolerance: float, what: str) -> None:
    """|actual - expected| <= tolerance * max |expected|, everywhere."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    top = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * top, err_msg=what)


def assert_native(case: Case, *, tolerance: float = 1e-6, rows: int | None = None) -> None:
    """On every path, the kernel gives what the definition says; with `rows`, for that many rows of activations."""
    expected: dict[str, list[Array]] = {}
    session = open_session(case.model(), native=True)
    for path in every_path():
        mode = "" if rows is None else native_mode(rows, path)
        if mode not in expected:
            expected[mode] = case.reference(**({"activations": mode} if mode else {}))
        allowed = tolerance
        if mode == "bfloat16":  # sums in float32; after a norm, now and then a number is rounded the other way
            allowed = 5e-4 if "Norm" in case.op else 2e-6
        for name, value, wanted in zip(
            OPS[case.op].outputs, session.run(None, case.inputs), expected[mode], strict=True
        ):
            assert_close(value, wanted, allowed, f"{name} on {path}")
