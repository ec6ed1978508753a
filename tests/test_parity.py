"""The parity check: its two measures by hand, and that it notices what it should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_decoder import LONG, engine_of
from test_engine import SPEC
from test_reference import IDS, rounded, tiny_checkpoint

from edgekit.bundle import MODEL, WEIGHTS
from edgekit.errors import ModelError
from edgekit.export.parity import BOUNDS, Bounds, agreement, check_parity, divergence
from edgekit.quant.grid import Grid
from edgekit.runtime.engine import Engine
from edgekit.weight import Floats

TWO = [LONG[:40], IDS]


def test_divergence_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    shifts = np.array([[3.0], [-200.0]])
    logits = (np.log(p) + shifts).astype(np.float32), (np.log(q) - shifts).astype(np.float32)
    np.testing.assert_allclose(divergence(*logits), [expected, expected], rtol=1e-4)
    assert divergence(logits[0], logits[0]).tolist() == [0.0, 0.0]


def test_divergence_of_far_apart_distributions_is_finite() -> None:
    far = np.array([[100.0, -100.0]], np.float32)
    np.testing.assert_allclose(divergence(far, far[:, ::-1]), [200.0])


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ([1.0, 0.0], [0.5, 0.4], True),
        ([1.0, 0.0], [0.4, 0.5], False),
        ([1.0, 0.97], [0.4, 0.5], True),  # a near tie
        ([1.0, 0.94], [0.4, 0.5], False),
        ([1.0, 0.97, 0.0], [0.0, 0.0, 9.0], False),  # a near tie, but a third token was chosen
    ],
)
def test_agreement_counts_near_ties(expected: list[float], got: list[float], same: bool) -> None:
    assert agreement(np.array([expected], np.float32), np.array([got], np.float32)).tolist() == [same]


def test_a_faithful_graph_passes_and_says_how_well(tmp_path: Path) -> None:
    engine = engine_of(tiny_checkpoint(), tmp_path)
    kl, top, drift = check_parity(tiny_checkpoint(), engine, TWO, bounds=BOUNDS["float32"])
    assert kl.value is not None
    assert kl.value < 1e-9
    assert (top.value, top.unit, kl.n) == (100.0, "%", 52)
    assert drift.value is not None
    assert 0 < drift.value < 1e-4
    assert engine.tokens == []


def test_integer_activations_pass_their_bounds_and_not_the_float_ones(tmp_path: Path) -> None:
    checkpoint = rounded(tiny_checkpoint(), Grid(4, 32, "symmetric"))
    engine = engine_of(checkpoint, tmp_path, int8=True)
    kl, *_ = check_parity(checkpoint, engine, TWO, bounds=BOUNDS["int8"])
    assert kl.value is not None
    assert kl.value > BOUNDS["float32"].kl
    with pytest.raises(ModelError, match="must agree with the checkpoint"):
        check_parity(checkpoint, engine, TWO, bounds=BOUNDS["float32"])


def places(folder: Path) -> dict[str, int]:
    """Constant -> offset in the weights file."""
    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    return {
        tensor.name: int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        for tensor in graph.initializer
        if tensor.external_data
    }


@pytest.mark.parametrize(
    "constant",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "rotary.sin",
    ],
)
def test_damaged_constants_are_noticed(tmp_path: Path, constant: str) -> None:
    """A hundred values of one constant set to 1, in a graph that still runs."""
    engine_of(tiny_checkpoint(), tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.seek(places(tmp_path)[constant])
        file.write(np.ones(100, np.float32).tobytes())
    engine = Engine(tmp_path / MODEL, SPEC, context=64, threads=1)
    with pytest.raises(ModelError, match=r"mean KL \S+ \(bound 1e-07\)"):
        check_parity(tiny_checkpoint(), engine, TWO, bounds=BOUNDS["float32"])


def test_a_sensitive_model_is_held_to_what_its_roundings_do(tmp_path: Path) -> None:
    """Bounds that nothing keeps widen to what 15-bit inputs and a float16 cache do to the NumPy forward; no further."""
    engine = engine_of(tiny_checkpoint(), tmp_path)
    strict = Bounds(kl=0.0, agreement=1.0, rounds=True)
    kl, _, _, own = check_parity(tiny_checkpoint(), engine, TWO, bounds=strict)
    assert kl.value is not None
    assert own.value is not None
    assert kl.value < own.value < 1e-5
    with pytest.raises(ModelError, match=r"bound 0\b"):
        check_parity(tiny_checkpoint(), engine, TWO, bounds=Bounds(kl=0.0, agreement=1.0))
    values = tiny_checkpoint().vector("model.layers.0.mlp.up_proj.weight").copy()
    values[3, 5] += 1
    other = tiny_checkpoint(tensors={"model.layers.0.mlp.up_proj.weight": values})
    with pytest.raises(ModelError, match="must agree"):
        check_parity(other, engine, TWO, bounds=strict)


def test_one_wrong_weight_is_noticed(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    values = checkpoint.vector("model.layers.0.mlp.up_proj.weight").copy()
    values[3, 5] += 1
    engine = engine_of(tiny_checkpoint(tensors={"model.layers.0.mlp.up_proj.weight": values}), tmp_path)
    with pytest.raises(ModelError, match="must agree"):
        check_parity(checkpoint, engine, TWO, bounds=BOUNDS["float32"])


def test_nan_is_never_accepted(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tensors={"model.norm.weight": np.full(64, np.nan, np.float32)})
    with pytest.raises(ModelError, match="logits must be finite"):
        check_parity(checkpoint, engine_of(checkpoint, tmp_path), TWO, bounds=Bounds(np.inf, 0.0))


class WrongAtDecode:
    """An engine whose runs of one token are wrong, as one kernel for one row may be."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rewind = engine.rewind

    def forward(self, ids: Sequence[int], *, keep: int = 1) -> Floats:
        logits = self.engine.forward(ids, keep=keep)
        return logits[:, ::-1] if len(ids) == 1 else logits


def test_errors_of_decoding_alone_are_noticed(tmp_path: Path) -> None:
    engine = WrongAtDecode(engine_of(tiny_checkpoint(), tmp_path))
    with pytest.raises(ModelError, match="must agree"):
        check_parity(tiny_checkpoint(), engine, TWO, bounds=BOUNDS["float32"])  # type: ignore[arg-type]


def test_agreement_is_asked_for_by_itself(tmp_path: Path) -> None:
    engine = WrongAtDecode(engine_of(tiny_checkpoint(), tmp_path))
    with pytest.raises(ModelError, match=r"top-1 agreement \d\d\.\d% \(bound 100%\)"):
        check_parity(tiny_checkpoint(), engine, TWO, bounds=Bounds(np.inf, 1.0))  # type: ignore[arg-type]


def test_one_token_is_enough_to_compare(tmp_path: Path) -> None:
    engine = engine_of(tiny_checkpoint(), tmp_path)
    assert check_parity(tiny_checkpoint(), engine, [[5]], bounds=BOUNDS["float32"])[0].n == 1
