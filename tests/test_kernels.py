"""The native kernels against their definition, and against models and tensors that are wrong.

A `Case` is one node with its inputs; `tests/test_functions.py` runs the same cases on stock onnxruntime. Weights are
random bytes, padding included, so that nothing rests on what a quantiser would write.
"""

from __future__ import annotations

import itertools
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

from edgekit.kernels import reference
from edgekit.kernels.library import choose_path, known_paths, library_path, path_name, register
from edgekit.kernels.opset import DOMAIN, OPS, VERSION
from edgekit.kernels.pack import Tiles, interleave, tile
from edgekit.weight import Floats, Quantized

LIBRARY = library_path()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="no kernel library: build it (see CMakeLists.txt) or name one by EDGEKIT_KERNELS"
)

Array = NDArray[Any]
Offsets = Literal["symmetric", "zeros", "minima"]

REFERENCE = {
    "QuantLinear": reference.quant_linear,
    "NormQuantLinear": reference.norm_quant_linear,
    "GatedNormQuantLinear": reference.gated_norm_quant_linear,
    "QuantEmbedding": reference.quant_embedding,
    "Attention": reference.attention,
    "NormAttention": reference.norm_attention,
}

# --- one node and what it reads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One node: what the model holds, what is fed, and its attributes."""

    op: str
    constants: dict[str, Array]
    inputs: dict[str, Array]
    attributes: dict[str, Any]

    def reference(self, **mode: Any) -> list[Array]:
        """The outputs by definition."""
        result: Any = REFERENCE[self.op](**self.constants, **self.inputs, **self.attributes, **mode)  # type: ignore[operator]
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
        halves = ("present_key", "present_value")
        made = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16 if name in halves else TensorProto.FLOAT, None)
            for name in op.outputs
        ]
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


def open_session(model: onnx.ModelProto | Path, *, native: bool, threads: int = 1) -> ort.InferenceSession:
    """The model with or without the kernel library, which must be there if `native`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        assert register(options, decode_threads=threads, prefill_threads=threads)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_natively(case: Case, *, threads: int = 1) -> list[Array]:
    outputs: list[Array] = open_session(case.model(), native=True, threads=threads).run(None, case.inputs)
    return outputs


def random_matrix(
    rng: np.random.Generator, rows: int, columns: int, *, bits: int, block: int, offsets: Offsets
) -> Quantized:
    """Random codes, scales of both signs and sizes, and zero points or minima."""
    blocks = -(-columns // block)
    scales = (rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-4, 1, (rows, blocks))).astype(np.float16)
    return Quantized(
        rng.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8),
        scales,
        rng.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if offsets == "zeros" else None,
        bits=bits,
        block=block,
        columns=columns,
        minima=rng.standard_normal((rows, blocks)).astype(np.float16) if offsets == "minima" else None,
    )


def native_mode(rows: int) -> Literal["int16", "int8"]:
    """How the kernels round that many rows of activations."""
    return "int16" if rows <= reference.FINE_ROWS else "int8"


def steady_activations(rng: np.random.Generator, rows: int, columns: int, block: int) -> Floats:
    """Rows whose codes no rounding error on the way can change: (1, rows, columns).

    Each block holds its peak and else numbers well away from the middle between two codes. Blocks differ in size; the
    second row and now and then a block are all zero.
    """
    blocks, steps = -(-columns // block), reference.STEPS[native_mode(rows)]
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
    parts = dict(zip(("codes", "scales", "zeros", "minima"), tiles.constants(), strict=True))
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
    rows: int = 2,
    extra: Extra = "nothing",
    seed: int = 0,
) -> Case:
    """QuantLinear of ordinary random activations."""
    rng = np.random.default_rng(seed)
    tiles = tile(random_matrix(rng, N, K, bits=bits, block=block, offsets=offsets))
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
    rows: int = 2,
    biased: bool = False,
    gated: bool = False,
    seed: int = 0,
) -> Case:
    """NormQuantLinear, or GatedNormQuantLinear with N / 2 rows of gate."""
    rng = np.random.default_rng(seed)
    kind: dict[str, Any] = {"bits": bits, "block": block, "offsets": offsets}
    norm = rng.uniform(0.5, 2, K).astype(np.float32) * rng.choice(np.array([-1, 1], np.float32), K)
    inputs: dict[str, Array] = {"x": steady_activations(rng, rows, K, block) / norm}
    if gated:
        halves = [tile(random_matrix(rng, N // 2, K, **kind)) for _ in range(2)]
        return matrix_case("GatedNormQuantLinear", interleave(*halves), inputs, {"norm": norm}, {}, epsilon=1e-5)
    tiles = tile(random_matrix(rng, N, K, **kind))
    bias = rng.standard_normal(N).astype(np.float32) if biased else NOTHING
    return matrix_case("NormQuantLinear", tiles, inputs, {"norm": norm}, {"bias": bias}, epsilon=1e-5)


def embedding_case(
    N: int, K: int, *, bits: int = 4, block: int = 32, offsets: Offsets = "symmetric", tokens: int = 40, seed: int = 0
) -> Case:
    rng = np.random.default_rng(seed)
    tiles = tile(random_matrix(rng, N, K, bits=bits, block=block, offsets=offsets))
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
    held = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    attributes |= {"head_dim": head_dim, "local_window_size": window}
    if not normed:
        return Case("Attention", held, fed, attributes)
    for name in ("q_norm", "k_norm"):
        held[name] = rng.uniform(0.5, 2, head_dim).astype(np.float32)
    return Case("NormAttention", held, fed, {**attributes, "epsilon": 1e-6})


# --- which of the library's paths runs --------------------------------------------------------------------------------


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


# --- products ---------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 575, 577, 1023)
ROWS = (0, 1, 2, 7, 8, 9, 17, 64, 65, 70)
KINDS = list(itertools.product((4, 8), (32, 64, 128), ("symmetric", "zeros", "minima")))
# Every kind twice, every size as N and as K, every number of rows: strides that are coprime to the lists' lengths.
TABLE = [
    (*KINDS[i % len(KINDS)], SIZES[3 * i % len(SIZES)], SIZES[(7 * i + 3) % len(SIZES)], ROWS[3 * i % len(ROWS)])
    for i in range(2 * len(KINDS))
]


def assert_close(actual: Array, expected: Array, tolerance: float, what: str) -> None:
    """|actual - expected| <= tolerance * max |expected|, everywhere."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    top = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * top, err_msg=what)


def assert_native(case: Case, *, tolerance: float = 1e-6, **mode: Any) -> None:
    """On every path, the kernel gives what the definition says."""
    expected = case.reference(**mode)
    session = open_session(case.model(), native=True)
    for path in every_path():
        for name, value, wanted in zip(OPS[case.op].outputs, session.run(None, case.inputs), expected, strict=True):
            assert_close(value, wanted, tolerance, f"{name} on {path}")


def test_the_table_covers_all_sizes() -> None:
    for column, values in ((3, SIZES), (4, SIZES), (5, ROWS)):
        assert {row[column] for row in TABLE} == set(values)
    assert {row[:3] for row in TABLE} == set(KINDS)


@pytest.mark.parametrize(("bits", "block", "offsets", "N", "K", "rows"), TABLE)
def test_products_are_as_defined(bits: int, block: int, offsets: Offsets, N: int, K: int, rows: int) -> None:
    kind: dict[str, Any] = {"bits": bits, "block": block, "offsets": offsets, "rows": rows}
    extra: tuple[Extra, ...] = ("nothing", "bias", "residual", "both")
    mode = native_mode(rows)
    assert_native(linear_case(N, K, **kind, extra=extra[(N + K) % 4]), activations=mode)
    assert_native(norm_case(N, K, **kind, biased=K % 2 == 0), activations=mode)
    assert_native(norm_case(2 * N, K, **kind, gated=True), activations=mode, tolerance=3e-6)


@pytest.mark.parametrize("extra", ["nothing", "bias", "residual", "both"])
@pytest.mark.parametrize(("N", "rows"), [(16, 1), (31, 1), (33, 9), (15, 70)])
def test_bias_and_residual_are_added(N: int, rows: int, extra: Extra) -> None:
    assert_native(linear_case(N, 40, rows=rows, extra=extra), activations=native_mode(rows))


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize(("bits", "block", "offsets"), KINDS)
def test_the_largest_codes_do_not_overflow(bits: int, block: int, offsets: Offsets, rows: int) -> None:
    """All codes at their ends and all activations at their peak: sums of 16 bits on the way would saturate."""
    rng = np.random.default_rng(0)
    weight = random_matrix(rng, 16, 256, bits=bits, block=block, offsets=offsets)
    codes = np.zeros_like(weight.codes)
    codes[::2] = 255
    weight = replace(weight, codes=codes, scales=np.ones_like(weight.scales))
    x = np.where(np.arange(rows)[:, None] % 2, -3, 3).astype(np.float32).repeat(256, axis=1)[None]
    case = matrix_case("QuantLinear", tile(weight), {"x": x}, {}, {"bias": NOTHING, "residual": NOTHING})
    assert_native(case, activations=native_mode(rows))


@pytest.mark.parametrize("rows", [2, 70])
def test_activations_at_the_ends_of_float32(rows: int) -> None:
    """Tiny, huge and zero rows; numbers that vanish beside their block's peak."""
    case = linear_case(17, 96, offsets="zeros", rows=rows)
    x = case.inputs["x"].copy()
    x[0, 0] *= 1e30
    x[0, 1] *= 1e-30
    x[0, -1, 32:64] = 0
    x[0, -1, 64] = 1e20
    case = case.changed(x=x)
    expected = case.reference(activations=native_mode(rows))[0][0]
    session = open_session(case.model(), native=True)
    for path in every_path():
        for row, wanted in zip(session.run(None, case.inputs)[0][0], expected, strict=True):
            assert_close(row, wanted, 1e-6, path)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 2, 1, 3, 1, 40)])
def test_any_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for extra in ("nothing", "bias"):
        assert_native(linear_case(17, 40, extra=extra).changed(x=x), activations="int16")


@pytest.mark.parametrize(("bits", "block", "offsets", "N", "K", "tokens"), TABLE)
def test_embeddings_are_exact(bits: int, block: int, offsets: Offsets, N: int, K: int, tokens: int) -> None:
    assert_native(embedding_case(N, K, bits=bits, block=block, offsets=offsets, tokens=tokens), tolerance=0)


def test_ids_may_have_any_shape() -> None:
    for shape in ((), (0,), (2, 3), (1, 2, 1, 3, 1)):
        assert_native(embedding_case(33, 40).changed(ids=np.full(shape, 32)), tolerance=0)


THREADED = {
    "one row": linear_case(577, 575, offsets="minima", rows=1, extra="both"),
    "seven rows": norm_case(577, 575, offsets="zeros", bits=8, rows=7),
    "many rows": norm_case(2 * 577, 575, rows=130, gated=True),
    "embedding": embedding_case(577, 575, tokens=300),
    "decode": attention_case(tokens=1, first=900, kv_heads=3, group=3, head_dim=64),
    "prefill": attention_case(tokens=130, first=33, kv_heads=2, group=3, head_dim=64, normed=True),
}


@pytest.mark.parametrize("name", THREADED)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    case = THREADED[name]
    alone = run_natively(case)
    for threads in (2, 3):
        for ours, theirs in zip(alone, run_natively(case, threads=threads), strict=True):
            assert ours.tobytes() == theirs.tobytes()


# --- attention --------------------------------------------------------------------------------------------------------

FIRST = (0, 1, 63, 64, 200)
TOKENS = (1, 2, 17, 65, 130)
HEADS = ((1, 1), (1, 3), (2, 4), (3, 1), (1, 9))
WIDTHS = (16, 64, 80, 96, 128)
WINDOWS = (-1, -1, 1, 2, 16, 63, 64, 65, 100, 1000)
ATTENTION = [
    (TOKENS[i % 5], FIRST[i // 5], *HEADS[(i + i // 5) % 5], WIDTHS[(2 * i + i // 5) % 5], WINDOWS[3 * i % 10])
    for i in range(25)
]


def assert_attends(case: Case, outputs: Sequence[Array], what: str) -> None:
    """The definition's y; its keys and values in all places up to the last token, keys to a rounding of float16."""
    expected = case.reference()
    used = int(case.inputs["last"][0]) + 1
    assert_close(outputs[0], expected[0], 2e-6 if case.op == "Attention" else 1e-4, f"y on {what}")
    keys, values = (cache[:, :, :used] for cache in outputs[1:])
    assert np.array_equal(values, expected[2][:, :, :used]), what
    if case.op == "Attention":
        assert np.array_equal(keys, expected[1][:, :, :used]), what
    else:
        np.testing.assert_array_max_ulp(keys, expected[1][:, :, :used])


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("tokens", "first", "kv_heads", "group", "head_dim", "window"), ATTENTION)
def test_attention_is_as_defined(
    tokens: int, first: int, kv_heads: int, group: int, head_dim: int, window: int, normed: bool
) -> None:
    case = attention_case(
        tokens=tokens,
        first=first,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        window=window,
        normed=normed,
    )
    session = open_session(case.model(), native=True)
    for path in every_path():
        assert_attends(case, session.run(None, case.inputs), path)


@pytest.mark.parametrize("window", [-1, 1, 127, 128, 1000])
def test_a_long_cache_is_decoded(window: int) -> None:
    """Long enough to be cut into as many stretches as there can be."""
    case = attention_case(tokens=1, first=2500, kv_heads=2, group=5, head_dim=32, window=window)
    session = open_session(case.model(), native=True)
    for path in every_path():
        assert_attends(case, session.run(None, case.inputs), path)


@pytest.mark.parametrize("tokens", [1, 20])
def test_large_scores_do_not_overflow(tokens: int) -> None:
    """Softmax of scores in the thousands; all weight may be on one key."""
    case = attention_case(tokens=tokens, first=70, group=2, head_dim=32)
    case = case.changed(qkv=case.inputs["qkv"] * np.float32(40))
    session = open_session(case.model(), native=True)
    for path in every_path():
        y = session.run(None, case.inputs)[0]
        assert_close(y, case.reference()[0], 2e-3, path)  # a score of 5000 is exact to 5e-4


@pytest.mark.parametrize("tokens", [1, 20])
def test_the_cache_grows_in_place_or_is_copied(tokens: int) -> None:
    case = attention_case(tokens=tokens, first=30, kv_heads=2, group=2, head_dim=32)
    session = open_session(case.model(), native=True)
    before = {name: values.copy() for name, values in case.inputs.items()}
    copied = session.run(None, case.inputs)
    assert all(np.array_equal(before[name], case.inputs[name], equal_nan=True) for name in before)
    assert np.isnan(copied[1][:, :, -1]).all()  # the copy is of the whole cache

    held = {name: ort.OrtValue.ortvalue_from_numpy(values) for name, values in before.items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    binding.bind_ortvalue_output("present_key", held["past_key"])
    binding.bind_ortvalue_output("present_value", held["past_value"])
    session.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[0].numpy(), copied[0])
    for name, value in zip(("past_key", "past_value"), copied[1:], strict=True):
        assert np.array_equal(held[name].numpy(), value, equal_nan=True)


def test_no_tokens_leave_the_cache_as_it_is() -> None:
    case = attention_case(tokens=0, first=9, kv_heads=2, head_dim=16)
    y, keys, values = run_natively(case)
    assert y.shape == (1, 0, 32)
    assert np.array_equal(keys, case.inputs["past_key"], equal_nan=True)
    assert np.array_equal(values, case.inputs["past_value"], equal_nan=True)


def test_decoding_token_by_token_equals_reading_at_once() -> None:
    whole = attention_case(tokens=40, kv_heads=2, group=3, head_dim=48, window=17)
    expected = whole.reference()[0]
    session = open_session(whole.model(), native=True)
    feed, rows = dict(whole.inputs), []
    for index in range(40):
        step = {"qkv": whole.inputs["qkv"][:, index : index + 1], "last": np.array([index], np.int32)}
        y, feed["past_key"], feed["past_value"] = session.run(None, {**feed, **step})
        rows.append(y)
    assert_close(np.concatenate(rows, axis=1), expected, 2e-6, "steps")


# --- weights mapped from a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 3, 63])
def test_weights_may_lie_at_any_offset_of_their_file(tmp_path: Path, shift: int) -> None:
    cases = [
        linear_case(33, 577, offsets="zeros", extra="bias"),
        norm_case(2 * 33, 577, bits=8, offsets="minima", gated=True),
        embedding_case(33, 577, offsets="minima"),
        attention_case(tokens=3, first=5, head_dim=32, normed=True),
    ]
    for case in cases:
        model = case.model()
        data = bytearray()
        for tensor in model.graph.initializer:
            data += b"\xff" * (shift if shift else -len(data) % 4096)
            for key, value in (("location", "weights"), ("offset", len(data)), ("length", len(tensor.raw_data))):
                tensor.external_data.add(key=key, value=str(value))
            data += tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        (tmp_path / "weights").write_bytes(data)
        (tmp_path / "model").write_bytes(model.SerializeToString())
        outputs = open_session(tmp_path / "model", native=True).run(None, case.inputs)
        for value, wanted in zip(outputs, run_natively(case), strict=True):
            assert np.array_equal(value, wanted, equal_nan=True)


# --- what is wrong is said --------------------------------------------------------------------------------------------


def fed_weights(case: Case, name: str) -> Case:
    """A constant that is an input of the model instead."""
    constants = {key: value for key, value in case.constants.items() if key != name}
    return replace(case, constants=constants, inputs={**case.inputs, name: case.constants[name]})


LINEAR = linear_case(33, 70, offsets="zeros", extra="both")
PLAIN = linear_case(33, 70)
LEAST = linear_case(33, 70, offsets="minima")
NORM = norm_case(33, 70, biased=True)
GATED = norm_case(34, 70, gated=True)
TABLE_OF_WORDS = embedding_case(33, 70)
ATTEND = attention_case(tokens=3, first=5, kv_heads=2, group=3, head_dim=32)
NORMED = attention_case(tokens=3, first=5, kv_heads=2, group=3, head_dim=32, normed=True)


def half(*shape: int) -> Array:
    return np.zeros(shape, np.float16)


def floats(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def octets(*shape: int, value: int = 0) -> Array:
    return np.full(shape, value, np.uint8)


WRONG: dict[str, tuple[Case, str]] = {
    "x too wide": (LINEAR.changed(x=floats(1, 2, 71)), "last dimension of x must be 70: got 71"),
    "x without dimensions": (LINEAR.changed(x=np.array(3, np.float32)), "last dimension of x must be 70: got 0"),
    "x of seven dimensions": (LINEAR.changed(x=floats(1, 1, 1, 1, 1, 1, 70)), "at most 6 dimensions: got 7"),
    "few codes": (LINEAR.changed(codes=octets(3, 3, 255)), "codes must have 2304 elements: got 2295"),
    "no codes": (LINEAR.changed(codes=octets(0)), "codes must have 2304 elements: got 0"),
    "few scales": (LINEAR.changed(scales=half(143)), "scales must have 144 elements: got 143"),
    "few zeros": (LINEAR.changed(zeros=octets(143)), r"zeros must be 144 .* got 143"),
    "no zeros": (LINEAR.changed(zeros=octets(0)), r"zeros must be 144 .* got 0"),
    "another single zero": (PLAIN.changed(zeros=octets(1, value=7)), r"a single 8 .* got 1, the first 7"),
    "zeros beside minima": (LEAST.changed(zeros=octets(1, value=8)), r"0 beside minima.* the first 8"),
    "all zeros beside minima": (LEAST.changed(zeros=octets(3, 3, 16)), r"0 beside minima.* got 144"),
    "few minima": (LEAST.changed(minima=half(143)), r"minima must be 144 .* got 143"),
    "a single minimum": (PLAIN.changed(minima=half(1) + 1), r"minima must be 144 .* a single zero"),
    "short bias": (LINEAR.changed(bias=floats(32)), r"bias must be 33 .* got 32"),
    "single bias": (LINEAR.changed(bias=floats(1) + 1), r"bias must be 33 .* a single zero"),
    "short residual": (LINEAR.changed(residual=floats(1, 1, 33)), r"residual must be 66 .* got 33"),
    "wide residual": (LINEAR.changed(residual=floats(1, 2, 34)), r"residual must be 66 .* got 68"),
    "no residual": (LINEAR.changed(residual=floats(0)), r"residual must be 66 .* got 0"),
    "short norm": (NORM.changed(norm=floats(69)), "norm must have 70 elements: got 69"),
    "N of nothing": (LINEAR.changed(N=0), "N must be from 1 to 16777216: got 0"),
    "N below nothing": (LINEAR.changed(N=-5), "N must be from 1 to 16777216: got -5"),
    "N past all": (LINEAR.changed(N=2**62), "N must be from 1 to 16777216: got 4611686018427387904"),
    "N too large": (LINEAR.changed(N=49), r"codes must have 3072 elements: got 2304"),
    "K of nothing": (LINEAR.changed(K=0), "K must be from 1 to 16777216: got 0"),
    "K too large": (LINEAR.changed(K=97), r"codes must have 3072 elements: got 2304"),
    "both at the limit": (LINEAR.changed(N=2**24, K=2**24), r"codes must have 140737488355328 elements: got 2304"),
    "5 bits": (LINEAR.changed(bits=5), "bits must be 4 or 8: got 5"),
    "2 bits": (LINEAR.changed(bits=2), "bits must be from 4 to 8: got 2"),
    "block of 48": (LINEAR.changed(block=48), "block must be 32, 64 or 128: got 48"),
    "block of 256": (LINEAR.changed(block=256), "block must be from 32 to 128: got 256"),
    "odd gate": (GATED.changed(N=33), "as many gate rows as up rows: N is 33"),
    "half a gate": (GATED.changed(codes=GATED.constants["codes"][:3]), "codes must have 3072 elements: got 2304"),
    "ids past the end": (TABLE_OF_WORDS.changed(ids=np.array([[0, 33]])), "ids must be from 0 to 32: got 33"),
    "ids below zero": (TABLE_OF_WORDS.changed(ids=np.array([[-1, 0]])), "ids must be from 0 to 32: got -1"),
    "ids far away": (TABLE_OF_WORDS.changed(ids=np.array([2**63 - 1])), "ids must be from 0 to 32: got 9223372036854775807"),
    "ids of six dimensions": (TABLE_OF_WORDS.changed(ids=np.zeros((1,) * 6, np.int64)), "at most 5 dimensions: got 6"),
    "heads of 24": (ATTEND.changed(head_dim=24), "head_dim must be a multiple of 16: got 24"),
    "heads of 8": (ATTEND.changed(head_dim=8), "head_dim must be from 16 to 1024: got 8"),
    "uneven heads": (ATTEND.changed(num_heads=7), "multiple of kv_num_heads: got 7 and 2"),
    "no heads": (ATTEND.changed(num_heads=0), "num_heads must be from 1 to 1024: got 0"),
    "no key heads": (ATTEND.changed(kv_num_heads=0), "kv_num_heads must be from 1 to 1024: got 0"),
    "window below nothing": (ATTEND.changed(local_window_size=-2), "local_window_size must be .* got -2"),
    "no window": (ATTEND.changed(local_window_size=0), "local_window_size must be -1 or at least 1: got 0"),
    "two sequences": (ATTEND.changed(qkv=floats(2, 3, 320)), r"qkv must have shape \(1, tokens, 320\): got \(2, 3, 320\)"),
    "narrow qkv": (ATTEND.changed(qkv=floats(1, 3, 319)), r"qkv must have shape \(1, tokens, 320\): got \(1, 3, 319\)"),
    "flat qkv": (ATTEND.changed(qkv=floats(3, 320)), r"qkv must have shape \(1, tokens, 320\): got \(3, 320\)"),
    "three key heads": (ATTEND.changed(past_key=half(1, 3, 13, 32)), r"past_key .* \(1, 2, length, 32\): got \(1, 3, 13, 32\)"),
    "wide values": (ATTEND.changed(past_value=half(1, 2, 13, 48)), r"past_value .* got \(1, 2, 13, 48\)"),
    "two caches": (ATTEND.changed(past_key=half(2, 2, 13, 32)), r"past_key .* got \(2, 2, 13, 32\)"),
    "flat cache": (ATTEND.changed(past_key=half(2, 13, 32)), r"past_key .* got \(2, 13, 32\)"),
    "uneven caches": (ATTEND.changed(past_value=half(1, 2, 14, 32)), r"past_value .* got \(1, 2, 14, 32\)"),
    "last past the cache": (ATTEND.changed(last=np.array([13], np.int32)), "tokens 11 to 13 must lie in the cache of 13"),
    "last before the tokens": (ATTEND.changed(last=np.array([1], np.int32)), "tokens -1 to 1 must lie in the cache of 13"),
    "last at the end": (ATTEND.changed(last=np.array([2**31 - 1], np.int32)), "to 2147483647 must lie in the cache of 13"),
    "last below zero": (ATTEND.changed(last=np.array([-(2**31)], np.int32)), "to -2147483648 must lie in the cache of 13"),
    "two lasts": (ATTEND.changed(last=np.array([7, 7], np.int32)), "last token must be one number: got 2"),
    "no last": (ATTEND.changed(last=np.zeros(0, np.int32)), "last token must be one number: got 0"),
    "short cosines": (ATTEND.changed(cos=floats(7, 16)), r"cos must have shape \(at least 8, 16\): got \(7, 16\)"),
    "narrow sines": (ATTEND.changed(sin=floats(8, 15)), r"sin must have shape \(at least 8, 16\): got \(8, 15\)"),
    "short head norm": (NORMED.changed(q_norm=floats(31)), "q_norm must have 32 elements: got 31"),
}  # fmt: skip
for name in ("codes", "scales", "zeros", "minima", "bias"):
    WRONG[f"{name} not constant"] = (fed_weights(LINEAR, name), f"input {name} must be a constant of the model")
WRONG["norm not constant"] = (fed_weights(NORM, "norm"), "input norm must be a constant of the model")
WRONG["head norm not constant"] = (fed_weights(NORMED, "k_norm"), "input k_norm must be a constant of the model")
for case in (LINEAR, GATED, TABLE_OF_WORDS, NORMED):
    for name in case.attributes:
        WRONG[f"{case.op} without {name}"] = (case.changed(**{name: None}), f"attribute {name} must be given")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_that_says_so(name: str) -> None:
    case, message = WRONG[name]
    with pytest.raises(Exception, match=f"{case.op}: .*{message}"):
        run_natively(case)


@pytest.mark.parametrize("rows", [3, 70])
def test_what_is_not_a_number_stays_in_its_row(rows: int) -> None:
    case = linear_case(17, 96, offsets="minima", rows=rows)
    x = case.inputs["x"].copy()
    x[0, 0, 5], x[0, 1, 40] = np.nan, np.inf
    session = open_session(case.model(), native=True)
    for path in every_path():
        good, bad = session.run(None, case.inputs)[0], session.run(None, {"x": x})[0]
        assert np.array_equal(good[:, 2:], bad[:, 2:]), path


OLD_RUNTIME = """
import ctypes, sys
lookup = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
version = ctypes.CFUNCTYPE(ctypes.c_void_p)
make_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)

@make_status
def status(code, text):
    print(code, text.decode())
    return 4321

table = (ctypes.c_void_p * 278)(ctypes.cast(status, ctypes.c_void_p).value)
number = ctypes.create_string_buffer(b"1.17.3")
get_api = lookup(lambda asked: ctypes.addressof(table) if asked <= 17 else None)
get_version = version(lambda: ctypes.addressof(number))
base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version)))
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
register.restype = ctypes.c_void_p
print(register(None, ctypes.byref(base)))
"""


def test_an_onnxruntime_that_is_too_old_is_told_so() -> None:
    """A table of version 17 and below, in a process of its own: the library would keep it."""
    command = [sys.executable, "-c", OLD_RUNTIME, str(LIBRARY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"2 .*need onnxruntime 1\.18 or newer.*1\.17\.3.*", said[0])
    assert said[1] == "4321"
