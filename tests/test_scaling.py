"""AWQ and SmoothQuant: the function stays, errors become smaller where activations are large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_folder

from edgekit.checkpoint import Block
from edgekit.errors import UserError
from edgekit.model.reference import _Layer
from edgekit.model.sources import open_model
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.quant.scaling import Awq, Smooth, awq_scales, smooth_scales
from edgekit.step import InputStatistics, StepContext, outline_of
from edgekit.weight import Floats


def statistics(width: int, *, seed: int = 0, outliers: float = 1.0) -> InputStatistics:
    random = np.random.default_rng(seed)
    X = random.standard_normal((200, width)) * np.where(np.arange(width) % 16 == 3, outliers, 1.0)
    return InputStatistics(X.T @ X, np.abs(X).mean(0), np.abs(X).max(0), 200)


class Fixed:
    """Inputs of every matrix drawn at random, with outlying channels."""

    def statistics(self, block: Block, module: str) -> InputStatistics:
        return statistics(block.matrices[module].shape[1], outliers=30.0)


@pytest.mark.parametrize("step", [Awq(bits=3), Awq(bits=4, offset="minimum", scales="int8"), Smooth(), Smooth(1.0)])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_layer_computes_the_same(tmp_path: Path, step: Any, architecture: str, kv_heads: int) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model", architecture=architecture, kv_heads=kv_heads)))
    block = checkpoint.read_block("layers.0")
    copies = {name: weight.dense().copy() for name, weight in block.matrices.items()}
    scaled, changes = step.apply(block, StepContext(checkpoint.decoder, 0, Fixed()))
    assert changes.changed == 7
    assert changes.facts["largest_over_smallest_scale"].value > 2
    for name, values in copies.items():
        np.testing.assert_array_equal(block.matrices[name].dense(), values)
    assert any(np.abs(scaled.matrices[name].dense() - values).max() > 0.01 for name, values in copies.items())
    x = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    before, after = _Layer(checkpoint, 0), _Layer(checkpoint, 0)
    prefix = "model.layers.0."
    after.weight = {name.removeprefix(prefix): weight.dense() for name, weight in scaled.matrices.items()}
    vectors = {name.removeprefix(prefix): values for name, values in scaled.vectors.items()}
    after.bias = {name: vectors[f"{name}.bias"] for name in before.bias}
    after.norm = {name: vectors[f"{name}.weight"] for name in before.norm}
    np.testing.assert_allclose(after(x, [slice(0, 7)]), before(x, [slice(0, 7)]), rtol=1e-4, atol=1e-4)
    predicted = step.predict(outline_of(checkpoint, "layers.0"), StepContext(checkpoint.decoder, 0))
    assert predicted.outline.size_bytes == scaled.size_bytes


@pytest.mark.parametrize("step", [Awq(), Smooth()])
def test_what_is_no_layer_stays(tmp_path: Path, step: Any) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model")))
    for name in ("embedding", "final"):
        block = checkpoint.read_block(name)
        after, changes = step.apply(block, StepContext(checkpoint.decoder, 0))
        assert after is block
        assert changes.changed == 0
        assert [skip.path for skip in changes.skipped] == list(block.matrices)


def output_error(W: Floats, scales: Any, found: InputStatistics, grid: Grid) -> float:
    s = np.asarray(scales, np.float32)
    error = W - round_to_grid(W * s, grid, where="w").dense() / s
    return float(np.einsum("ij,ij->", error @ found.gram, error))


def test_awq_lowers_the_output_error_and_does_nothing_without_outliers() -> None:
    W = np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)
    grid = Grid(3, 32, "zero")
    found = statistics(64, outliers=20.0)
    scales = awq_scales([W], found, grid)
    assert output_error(W, scales, found, grid) < 0.7 * output_error(W, np.ones(64), found, grid)
    outlying = np.arange(64) % 16 == 3
    assert scales[outlying].min() > 2 * scales[~outlying].max()
    even = InputStatistics(np.eye(64), np.ones(64), np.ones(64), 1)
    np.testing.assert_array_equal(awq_scales([W], even, grid), np.ones(64))


def test_smooth_is_its_formula_and_leaves_dead_channels() -> None:
    W = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    V = np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32)
    W[:, 2] = V[:, 2] = 0
    most = np.array([4.0, 9.0, 1.0, 0.0, 2.0])
    found = InputStatistics(np.eye(5), most, most, 1)
    weights = np.maximum(np.abs(W).max(0), np.abs(V).max(0))
    expected = [most[j] ** 0.25 / weights[j] ** 0.75 if j not in (2, 3) else 1.0 for j in range(5)]
    np.testing.assert_allclose(smooth_scales([W, V], found, 0.25), expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha must be from 0 to 1"):
        Smooth(alpha)


def test_the_grid_of_awq_is_checked() -> None:
    with pytest.raises(UserError, match="bits must be one of"):
        Awq(bits=7)  # type: ignore[arg-type]
