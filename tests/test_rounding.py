"""The steps quant.int8 and quant.int4: which matrices they treat, what they say of the rest, and their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.manifest import SourceRecord
from edgekit.model.config import decoder_config
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.quant.rounding import Int2, Int3, Int4, Int8
from edgekit.step import MatrixOutline, Outline, StepContext, join_facts
from edgekit.weight import Dense, Floats, Quantized

CONFIG = tiny_config(
    architecture="LlamaForCausalLM", layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocabulary=384,
    tied=False, dtype="float32",
)  # fmt: skip
CONTEXT = StepContext(decoder_config(CONFIG), seed=0)
UP, DOWN, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm.weight"


def gaussian(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer() -> Block:
    weights = {UP: Dense(gaussian(96, 64)), DOWN: Dense(gaussian(64, 96, seed=1))}
    return Block("layers.0", dict(weights), {NORM: gaussian(64)})


def table() -> Block:
    return Block("embedding", {"model.embed_tokens": Dense(gaussian(384, 64))})


def head() -> Block:
    return Block("final", {"lm_head": Dense(gaussian(384, 64))}, {"model.norm.weight": gaussian(64)})


def outline(block: Block) -> Outline:
    matrices = {
        name: MatrixOutline(weight.shape, weight.size_bytes, isinstance(weight, Dense))
        for name, weight in block.matrices.items()
    }
    return Outline(block.name, matrices, sum(vector.nbytes for vector in block.vectors.values()))


def bits_of(block: Block) -> list[int]:
    return [weight.bits if isinstance(weight, Quantized) else 32 for weight in block.matrices.values()]


STEPS = [
    (Int4(), 4, 8),
    (Int8(), 8, 8),
    (Int4(embedding="int4"), 4, 4),
    (Int4(embedding="keep"), 4, 32),
    (Int8(embedding="int4", block=64), 8, 4),
    (Int4(offset="symmetric", block=64), 4, 8),
    (Int4(offset="minimum", scales="int8", embedding="int6"), 4, 6),
    (Int3(block=64, embedding="int5"), 3, 5),
    (Int3(offset="zero", search=False, embedding="int3"), 3, 3),
    (Int2(embedding="int2", scales="float16"), 2, 2),
]


@pytest.mark.parametrize(("step", "linear", "ends"), STEPS)
def test_linears_and_tables_get_their_bits(step: Int2 | Int3 | Int4 | Int8, linear: int, ends: int) -> None:
    assert bits_of(step.apply(layer(), CONTEXT)[0]) == [linear, linear]
    assert bits_of(step.apply(table(), CONTEXT)[0]) == [ends]
    assert bits_of(step.apply(head(), CONTEXT)[0]) == [ends]


@pytest.mark.parametrize(("step", "linear", "ends"), STEPS)
@pytest.mark.parametrize("block", [layer(), table(), head()], ids=lambda block: str(block.name))
def test_predicted_sizes_are_the_real_ones(
    step: Int2 | Int3 | Int4 | Int8, linear: int, ends: int, block: Block
) -> None:
    predicted = step.predict(outline(block), CONTEXT)
    assert predicted.outline == outline(step.apply(block, CONTEXT)[0])
    assert predicted.seconds > 0 or ends == 32


def test_the_codes_are_those_of_the_grid_and_nothing_else_changes() -> None:
    before = layer()
    kept = {name: weight.dense().copy() for name, weight in before.matrices.items()}
    after, changes = Int4().apply(before, CONTEXT)
    expected = round_to_grid(kept[UP], Grid(4, 32, "zero"), where=UP)
    rounded = after.matrices[UP]
    assert isinstance(rounded, Quantized)
    np.testing.assert_array_equal(rounded.codes, expected.codes)
    np.testing.assert_array_equal(after.vectors[NORM], before.vectors[NORM])
    assert changes.changed == 2
    for name, values in kept.items():
        np.testing.assert_array_equal(before.matrices[name].dense(), values)


def test_eight_bit_tables_are_symmetric_and_four_bit_ones_follow_the_step() -> None:
    def zeros(step: Int2 | Int3 | Int4 | Int8) -> bool:
        weight = step.apply(table(), CONTEXT)[0].matrices["model.embed_tokens"]
        assert isinstance(weight, Quantized)
        return weight.zeros is not None

    assert not zeros(Int4(offset="zero"))
    assert not zeros(Int8(offset="zero"))
    assert zeros(Int4(embedding="int4", offset="zero"))
    assert not zeros(Int4(embedding="int4", offset="symmetric"))


@pytest.mark.parametrize(
    ("step", "weight", "reason"),
    [
        (Int4(skip=("*.up_proj",)), Dense(gaussian(96, 64)), "matches the pattern *.up_proj of skip"),
        (Int4(), round_to_grid(gaussian(96, 64), Grid(8, 32, "symmetric"), where=UP), "is quantised already"),
        (Int4(block=128), Dense(gaussian(96, 64)), "its width 64 is below the block of 128"),
    ],
)
def test_what_cannot_be_treated_is_left_with_a_reason(step: Int4, weight: Any, reason: str) -> None:
    block = Block("layers.0", {UP: weight, DOWN: Dense(gaussian(64, 256))})
    after, changes = step.apply(block, CONTEXT)
    assert after.matrices[UP] is weight
    assert [(skip.path, skip.reason) for skip in changes.skipped] == [(UP, reason)]
    assert changes.changed == 1
    assert step.predict(outline(block), CONTEXT).outline == outline(after)


def test_a_kept_table_is_recorded_and_gives_no_facts() -> None:
    _, changes = Int4(embedding="keep").apply(table(), CONTEXT)
    assert changes.skipped[0].reason == "embedding is to be kept"
    assert changes.changed == 0
    assert changes.facts == {}


def test_the_relative_error_joined_over_blocks_is_that_of_all_weights_together() -> None:
    blocks = [layer(), Block("layers.1", {DOWN.replace("0", "1"): Dense(100 * gaussian(8, 40))}), table()]
    error = power = 0.0
    facts = []
    for block in blocks:
        after, changes = Int4().apply(block, CONTEXT)
        facts.append(changes.facts)
        for name, weight in block.matrices.items():
            exact = weight.dense().astype(np.float64)
            error += float(((after.matrices[name].dense() - exact) ** 2).sum())
            power += float((exact**2).sum())
    joined = join_facts(facts)
    assert joined["relative_error"] == pytest.approx((error / power) ** 0.5, rel=1e-5)
    assert 0.05 < joined["relative_error"] < joined["worst_relative_error"] < 0.2


def test_zero_weights_have_no_error() -> None:
    after, changes = Int8().apply(Block("layers.0", {UP: Dense(np.zeros((8, 64), np.float32))}), CONTEXT)
    assert (after.matrices[UP].dense() == 0).all()
    assert {name: fact.value for name, fact in changes.facts.items()} == {
        "relative_error": 0.0,
        "worst_relative_error": 0.0,
    }


def test_a_broken_weight_is_named() -> None:
    with pytest.raises(ModelError, match=UP):
        Int4().apply(Block("layers.0", {UP: Dense(np.full((4, 64), np.nan, np.float32))}), CONTEXT)


@pytest.mark.parametrize("step", [Int2, Int3, Int4, Int8])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 48}, "block must be one of 32, 64, 128: got 48"),
        ({"offset": "middle"}, "offset must be one of symmetric, zero, minimum: got 'middle'"),
        ({"scales": "int4"}, "scales must be one of float16, int8"),
        ({"search": 1}, "search must be true or false"),
        ({"embedding": "int16"}, "embedding must be one of int2, int3, int4, int5, int6, int8, keep: got 'int16'"),
        ({"skip": "*.down_proj"}, "skip must be a list of patterns"),
    ],
)
def test_options_are_checked_when_a_step_is_built(step: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step(**options)


class Names:
    """A TensorReader of one layer that only knows names and shapes."""

    def files(self) -> set[Path]:
        return set()

    def names(self) -> list[str]:
        return [f"{UP}.weight", f"{DOWN}.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        return (96, 64)

    def read(self, name: str) -> Any:
        raise AssertionError("prepare reads no weights")


def test_a_pattern_that_matches_nothing_is_a_slip_of_the_pen() -> None:
    checkpoint = Checkpoint(CONFIG, Names(), SourceRecord("t", "folder", "0"), {})
    assert Int4(skip=("*.up_proj",)).prepare(checkpoint) is checkpoint
    with pytest.raises(UserError, match=r"'layers\.0\.\*' matches none; modules are named as model\.layers\.0\.mlp"):
        Int4(skip=("*.up_proj", "layers.0.*")).prepare(checkpoint)
