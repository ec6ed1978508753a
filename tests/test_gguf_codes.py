import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tiny import tiny_folder, tiny_gguf

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import UserError
from edgekit.model.gguf_codes import FORMATS, read_codes
from edgekit.model.sources import open_model
from edgekit.quant.keep import Keep
from edgekit.recipe import load_recipe
from edgekit.weight import Dense, Quantized, unpack


def raw_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a type, with scales that are ordinary numbers."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    halves = {"Q4_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in halves:
        values = rng.uniform(-0.1, 0.1, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 512), (3, 1024)])
def test_codes_stand_for_the_values_that_the_gguf_package_reads(kind, rows, columns):
    raw = raw_blocks(kind, rows, columns)
    expected = dequantize(raw, GGMLQuantizationType[kind])
    got = read_codes(raw, kind).dense()
    # The products of scales of K types are rounded to float16; the others are exact up to one float32 rounding.
    tolerance = 4e-3 * np.abs(expected).max() if kind.endswith("_K") else 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def test_an_order_permutes_rows():
    raw = raw_blocks("Q4_1", 4, 64)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(read_codes(raw, "Q4_1", order).dense(), read_codes(raw, "Q4_1").dense()[order])


def test_golden_bytes_of_a_q4_1_block():
    raw = np.zeros((1, 20), np.uint8)
    raw[0, :4] = np.array([2.0, -1.0], np.float16).view(np.uint8)
    raw[0, 4] = 0x5A  # weight 0 has code 10, weight 16 has code 5
    got = read_codes(raw, "Q4_1")
    assert got.minima is not None
    assert (got.dense()[0, 0], got.dense()[0, 16], got.dense()[0, 1]) == (19.0, 9.0, -1.0)


def test_golden_bytes_of_a_q6_k_block():
    raw = np.zeros((1, 210), np.uint8)
    raw[0, 208:] = np.array([0.5], np.float16).view(np.uint8)
    raw[0, 192 : 192 + 16] = np.arange(-8, 8, dtype=np.int8).view(
        np.uint8
    )  # the scale of weights 16 i to 16 i + 15 is i - 8
    raw[0, 3] = 0xA5  # low halves of weights 3 (5) and 67 (10)
    raw[0, 128 + 3] = 0b10_01_11_00  # high pairs of weights 3 (0), 35 (3), 67 (1), 99 (2)
    raw[0, 127] = 0x10  # of weights 191 (0) and 255 (1)
    got = read_codes(raw, "Q6_K")
    assert (got.bits, got.block, got.zeros, got.minima) == (6, 16, None, None)
    codes = unpack(got.codes, 6).reshape(-1)
    assert codes[[3, 35, 67, 99, 191, 255, 0]].tolist() == [5, 48, 26, 32, 0, 1, 0]
    assert got.dense()[0, [3, 35, 67, 255]].tolist() == [-4.0 * -27, -3.0 * 16, -2.0 * -6, 3.5 * -31]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_the_lossless_recipe_keeps_every_value(tmp_path, kind):
    sizes = {"hidden": 256, "mlp": 256} if kind.endswith("_K") else {}
    source = open_model(str(tiny_gguf(tmp_path / "tiny.gguf", quantization=kind, **sizes)))
    compress(source, load_recipe("lossless"), tmp_path / "kept")
    kept = open_checkpoint(tmp_path / "kept")
    seen = 0
    for matrices, vectors in source.blocks.values():
        for module in matrices:
            weight, before = kept.weight(module), source.weight(module).dense()
            if source.tensors.kind(f"{module}.weight") == kind:
                assert isinstance(weight, Quantized)
                tolerance = 1e-3 if kind.endswith("_K") else 1e-6
                np.testing.assert_allclose(weight.dense(), before, rtol=0, atol=tolerance * np.abs(before).max())
                seen += 1
        for name in vectors:
            np.testing.assert_array_equal(kept.vector(name), source.vector(name))
    assert seen > 0


def test_matrices_of_other_types_are_named(tmp_path):
    source = open_model(str(tiny_gguf(tmp_path / "tiny.gguf", quantization="F16")))
    prepared = Keep().prepare(source)
    block = prepared.read_block("layers.0")
    kept, changes = Keep().apply(block, None)
    assert all(isinstance(weight, Dense) for weight in kept.matrices.values())
    assert {skip.path for skip in changes.skipped} == set(block.matrices)


def test_a_folder_has_no_codes_to_keep(tmp_path):
    source = open_model(str(tiny_folder(tmp_path / "tiny")))
    with pytest.raises(UserError, match=r"quant.keep takes the codes of a .gguf file"):
        compress(source, load_recipe("lossless"), tmp_path / "kept")


def test_the_gguf_package_writes_what_we_read(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    raw = quantize(values, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(read_codes(raw, "Q8_0").dense(), dequantize(raw, GGMLQuantizationType.Q8_0))
