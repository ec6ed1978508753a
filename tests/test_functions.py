"""The function bodies on stock onnxruntime against the definition; and that a registered kernel runs in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from kernel_cases import (
    Array,
    Case,
    Extra,
    Offsets,
    Scales,
    assert_close,
    attention_case,
    embedding_case,
    linear_case,
    needs_library,
    norm_case,
    open_session,
    run_in_place,
)

from edgekit.kernels import reference
from edgekit.kernels.functions import function_bodies
from edgekit.kernels.opset import DOMAIN, OPS
from edgekit.kernels.pack import Tiles, untile
from edgekit.weight import unpack

EXACT = function_bodies(int8_activations=False)
ROUNDED = function_bodies()


def run_stock(case: Case, functions: Sequence[onnx.FunctionProto] = EXACT) -> list[Array]:
    outputs: list[Array] = open_session(case.model(functions), native=False).run(None, case.inputs)
    return outputs


def optimised(case: Case, folder: Path) -> Counter[str]:
    """The nodes that stock onnxruntime runs for a case, by operator."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(case.model(ROUNDED).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


# --- the same values --------------------------------------------------------------------------------------------------

# Bits, block, offsets, scales, N, K, rows: padded rows, padded columns, an odd number of blocks (whose packed zero
# points end in half a byte), one row, one column.
PRODUCTS: list[tuple[int, int, Offsets, Scales, int, int, int]] = [
    (2, 32, "symmetric", "float16", 33, 577, 3),
    (2, 64, "zeros", "int8", 16, 96, 1),
    (2, 128, "minima", "int8", 31, 575, 9),
    (3, 32, "minima", "int8", 33, 577, 2),
    (3, 64, "symmetric", "int8", 1, 64, 2),
    (3, 128, "zeros", "float16", 47, 129, 1),
    (4, 32, "symmetric", "float16", 33, 577, 3),
    (4, 32, "zeros", "float16", 16, 96, 1),
    (4, 32, "minima", "float16", 31, 575, 9),
    (4, 32, "minima", "int8", 33, 577, 2),
    (4, 64, "symmetric", "float16", 1, 64, 2),
    (4, 64, "zeros", "int8", 47, 129, 2),
    (4, 64, "minima", "float16", 17, 1, 7),
    (4, 128, "zeros", "float16", 3, 1023, 1),
    (4, 128, "minima", "float16", 32, 128, 2),
    (5, 32, "zeros", "int8", 33, 577, 1),
    (5, 64, "minima", "float16", 17, 100, 2),
    (6, 32, "minima", "int8", 15, 33, 17),
    (6, 16, "symmetric", "float16", 33, 96, 3),
    (6, 16, "symmetric", "int8", 1, 1024, 1),
    (6, 128, "symmetric", "float16", 2, 257, 2),
    (8, 32, "symmetric", "float16", 15, 33, 17),
    (8, 32, "zeros", "float16", 33, 577, 1),
    (8, 32, "minima", "float16", 2, 31, 2),
    (8, 32, "minima", "int8", 18, 70, 2),
    (8, 64, "zeros", "float16", 575, 65, 1),
    (8, 64, "minima", "float16", 16, 1023, 2),
    (8, 128, "symmetric", "int8", 17, 100, 2),
    (8, 128, "zeros", "float16", 1, 257, 3),
]
EXTRAS: tuple[Extra, ...] = ("nothing", "bias", "residual", "both")


@pytest.mark.parametrize(("bits", "block", "offsets", "scales", "N", "K", "rows"), PRODUCTS)
def test_bodies_of_matrices(bits: int, block: int, offsets: Offsets, scales: Scales, N: int, K: int, rows: int) -> None:
    kind: dict[str, Any] = {"bits": bits, "block": block, "offsets": offsets, "scales": scales}
    products = [
        linear_case(N, K, **kind, rows=rows, extra=EXTRAS[N % 4]),
        norm_case(N, K, **kind, rows=rows, biased=N % 2 == 0),
        norm_case(2 * N, K, **kind, rows=rows, gated=True),
    ]
    for case in products:
        tolerance = 1e-4 if case.op.startswith("Gated") else 1e-5  # the product of two
        assert_close(run_stock(case)[0], case.reference()[0], tolerance, case.op)
    table = embedding_case(N, K, **kind)
    assert_close(run_stock(table)[0], table.reference()[0], 0, table.op)


def from_middle(case: Case) -> Array:
    """scale * (code - middle): (N, K)."""
    names = ("codes", "scales", "minima", "steps")
    codes, scales, minima, steps = (case.constants[name] for name in names)
    sizes = {"bits": case.attributes["bits"], "block": case.attributes["block"]}
    rows, columns = case.attributes["N"], case.attributes["K"]
    kept = steps if scales.dtype == np.uint8 else None
    weight = untile(Tiles(codes, scales, minima, **sizes, rows=rows, columns=columns, steps=kept))
    found = unpack(weight.codes, weight.bits).reshape(rows, -1, weight.block).astype(np.float64)
    found -= 1 << (weight.bits - 1)
    values: Array = (found * weight.block_scales()[:, :, None]).reshape(rows, -1)[:, :columns]
    return values


@pytest.mark.parametrize(("bits", "block", "offsets", "scales", "N", "K", "rows"), PRODUCTS)
def test_integer_bodies_drift_by_a_rounding(
    bits: int, block: int, offsets: Offsets, scales: Scales, N: int, K: int, rows: int
) -> None:
    """Only what is measured from the zero point, or from the middle code beside minima, meets rounded activations."""
    case = linear_case(N, K, bits=bits, block=block, offsets=offsets, scales=scales, rows=rows)
    exact, rounded = case.reference()[0], run_stock(case, ROUNDED)[0]
    if offsets == "minima":
        x, W = case.inputs["x"], from_middle(case)
        drift = reference.product(x, W, block, "int8") - reference.product(x, W, block, "float32")
    else:
        drift = case.reference(activations="int8")[0] - exact
    top = np.abs(exact).max()
    in_floats = np.abs(rounded - exact).max() <= 1e-5 * top  # where onnxruntime has no integer kernel
    assert in_floats or np.abs(rounded - (exact + drift)).max() <= 1e-5 * top


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 2, 1, 3, 1, 40)])
def test_any_leading_dimensions_are_rows(shape: tuple[int, ...], extra: Extra) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for offsets in ("zeros", "minima"):
        case = linear_case(17, 40, offsets=offsets, extra=extra).changed(x=x)
        if "residual" in case.inputs:
            case = case.changed(residual=np.ones((*shape[:-1], 17), np.float32))
        assert_close(run_stock(case)[0], case.reference()[0], 1e-5, str(shape))


def test_ids_may_have_any_shape() -> None:
    for shape in ((), (3,), (2, 3), (1, 2, 1, 3, 1)):
        case = embedding_case(33, 40).changed(ids=np.full(shape, 32))
        assert_close(run_stock(case)[0], case.reference()[0], 0, str(shape))


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("tokens", "first", "kv_heads", "group", "head_dim", "window"),
    [
        (1, 0, 1, 1, 16, -1),
        (1, 63, 2, 4, 64, -1),
        (17, 0, 1, 3, 80, -1),
        (65, 200, 3, 1, 96, 64),
        (2, 1, 1, 3, 128, 1),
        (130, 64, 2, 2, 32, 100),
    ],
)
def test_bodies_of_attention(
    tokens: int, first: int, kv_heads: int, group: int, head_dim: int, window: int, normed: bool
) -> None:
    """To the precision of float16; the cache as the native kernel writes it, to one rounding."""
    case = attention_case(
        tokens=tokens,
        first=first,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        window=window,
        normed=normed,
    )
    outputs, expected = run_stock(case), case.reference()
    used = first + tokens
    assert_close(outputs[0], expected[0], 2e-3, "y")
    np.testing.assert_array_max_ulp(outputs[1][:, :, :used], expected[1][:, :, :used], 1)
    assert np.array_equal(outputs[2][:, :, :used], expected[2][:, :, :used])


def test_the_cache_of_a_body_grows_in_place() -> None:
    case = attention_case(tokens=3, first=20, kv_heads=2, group=2, head_dim=32)
    session = open_session(case.model(ROUNDED), native=False)
    y, keys, values = run_in_place(session, case)
    expected = case.reference()
    assert_close(y, expected[0], 2e-3, "y")
    np.testing.assert_array_max_ulp(keys[:, :, :23], expected[1][:, :, :23], 1)
    assert np.array_equal(values[:, :, :23], expected[2][:, :, :23])


# --- few nodes --------------------------------------------------------------------------------------------------------

LINEAR = {"MatMulNBits": 1, "Add": 1}
NORMED = {"MatMulNBits": 1, "SimplifiedLayerNormalization": 1}


@pytest.mark.parametrize(
    ("case", "nodes"),
    [
        (linear_case(33, 70, extra="residual"), LINEAR),
        (linear_case(33, 70, extra="both", offsets="zeros", bits=8), LINEAR),
        (norm_case(33, 70, biased=True), NORMED),
        (norm_case(34, 70, gated=True, offsets="zeros"), {**NORMED, "Split": 1, "QuickGelu": 1, "Mul": 1}),
    ],
)
def test_what_depends_on_constants_alone_is_computed_once(case: Case, nodes: dict[str, int], tmp_path: Path) -> None:
    assert optimised(case, tmp_path) == nodes


def test_codes_are_unpacked_once_with_minima_too(tmp_path: Path) -> None:
    found = optimised(linear_case(33, 70, offsets="minima"), tmp_path)
    assert not {"BitShift", "BitwiseAnd", "Transpose", "If", "Range", "Cast", "Gather"} & set(found)


def test_bodies_are_small_and_well_formed() -> None:
    for function in ROUNDED:
        op = OPS[function.name]
        assert (function.domain, tuple(function.input)) == (DOMAIN, op.inputs)
        assert (tuple(function.output), tuple(function.attribute)) == (op.outputs, op.attributes)
        assert function.ByteSize() < 10240
    assert [function.name for function in ROUNDED] == list(OPS)


# --- one file, two speeds ---------------------------------------------------------------------------------------------

CASES = [
    linear_case(33, 70, extra="both"),
    norm_case(33, 70),
    norm_case(34, 70, gated=True),
    embedding_case(33, 70),
    attention_case(tokens=3, first=5, head_dim=32),
    attention_case(tokens=3, first=5, head_dim=32, normed=True),
]


def marked(functions: Sequence[onnx.FunctionProto]) -> list[onnx.FunctionProto]:
    """The bodies, but their y is larger by 1000."""
    tagged = []
    for body in functions:
        function = onnx.FunctionProto()
        function.CopyFrom(body)
        for node in function.node:
            node.output[:] = ["unmarked" if name == "y" else name for name in node.output]
        function.node.append(onnx.helper.make_node("Constant", [], ["thousand"], value_float=1000.0))
        function.node.append(onnx.helper.make_node("Add", ["unmarked", "thousand"], ["y"]))
        tagged.append(function)
    return tagged


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_without_the_library_the_body_runs(case: Case) -> None:
    plain, tagged = run_stock(case, ROUNDED)[0], run_stock(case, marked(ROUNDED))[0]
    np.testing.assert_allclose(tagged, plain + 1000, atol=1e-3)


@needs_library
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_with_the_library_the_kernel_runs(case: Case) -> None:
    """The same file, with bodies that differ from the kernels by 1000."""
    y = open_session(case.model(marked(ROUNDED)), native=True).run(None, case.inputs)[0]
    alone = open_session(case.model(), native=True).run(None, case.inputs)[0]
    assert np.array_equal(y, alone)
    assert np.abs(y - case.reference()[0]).max() < 10
