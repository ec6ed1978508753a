"""Which factors a bundle keeps: those that are predicted no slower, each with its reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tn_steps import UP, made

from edgekit.checkpoint import Checkpoint
from edgekit.device import load_device
from edgekit.export.contract import contracted
from edgekit.export.export import export
from edgekit.export.parity import DriftError
from edgekit.export.targets import TARGETS
from edgekit.model.reference import forward
from edgekit.tn.cost import Cost, cost_of_dense, cost_of_rank
from edgekit.weight import Dense, Factored, Quantized


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made(tmp_path_factory.mktemp("floats"), "keep = 0.6\nmultiple = 1")


@pytest.fixture(scope="module", params=[8, 4])
def rounded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    folder = tmp_path_factory.mktemp("rounded")
    return made(folder, f'keep = 0.9\n[[step]]\nuse = "quant.int{request.param}"\n')


def test_small_factors_are_multiplied_out(floats: Checkpoint) -> None:
    view, rows = contracted(floats, load_device("pi5"))
    assert isinstance(view.weight(UP), Dense)
    np.testing.assert_array_equal(view.weight(UP).dense(), floats.weight(UP).dense())
    ids = [[3, 4, 5, 6]]
    np.testing.assert_allclose(forward(view, ids)[0], forward(floats, ids)[0], atol=1e-5)
    assert [row.value for row in rows] == [0, 14]
    assert f"{UP} contracted" in rows[1].note


def test_rounded_factors_give_a_matrix_of_their_bits(rounded: Checkpoint) -> None:
    view, rows = contracted(rounded, load_device("pi5"))
    before, weight = rounded.weight(UP), view.weight(UP)
    assert isinstance(before, Factored)
    assert isinstance(weight, Quantized)
    assert isinstance(before.factors[0], Quantized)
    assert weight.bits == before.factors[0].bits
    assert (weight.minima is None) == (before.factors[0].minima is None)
    tolerance = {8: 0.01, 4: 0.1}[weight.bits] * np.abs(before.dense()).max()
    assert np.abs(weight.dense() - before.dense()).mean() < tolerance
    assert rows[1].value
    names = [name for name in view.tensors.names() if name.startswith(f"{UP}.")]
    assert all(view.tensors.read(name).shape == view.tensors.shape(name) for name in names)


def test_matrices_that_share_a_node_are_decided_together(floats: Checkpoint) -> None:
    """At some bandwidth factors of q, k and v pay one by one, but not against the one node that they are otherwise."""
    q = "model.layers.0.self_attn.q_proj"
    kept = []
    for native in (False, True):
        slow = dataclasses.replace(load_device("pi5"), bandwidth_decode_gbs=0.6)
        view, _ = contracted(floats, slow, native=native)
        found = [isinstance(view.weight(q.replace("q_proj", f"{x}_proj")), Factored) for x in "qkv"]
        kept.append(found)
    assert kept[0][0]
    assert not any(kept[1])


def test_what_rounding_a_product_costs_is_recorded(rounded: Checkpoint, tmp_path: Path) -> None:
    report = export(rounded, tmp_path / "small", target=TARGETS["portable"], device=load_device("pi5"))
    moved = {row.name: row.value for row in report.measurements}["contracted products: mean KL to the factors"]
    assert moved is not None
    assert 0 < moved < 1


def test_rounding_a_product_too_far_is_refused_and_factors_may_be_kept(
    rounded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.export.export.CONTRACTED_KL", 1e-9)
    where: dict[str, Any] = {"target": TARGETS["portable"], "device": load_device("pi5")}
    with pytest.raises(DriftError, match="pass --factors keep for the slower model, --accept-drift for this one"):
        export(rounded, tmp_path / "refused", **where)
    assert not list(tmp_path.iterdir())
    assert export(rounded, tmp_path / "accepted", **where, accept_drift=True).measurements
    report = export(rounded, tmp_path / "kept", **where, factors="keep")
    assert not [row for row in report.measurements if "factor" in row.name]


def test_a_slow_device_keeps_them(floats: Checkpoint) -> None:
    slow = dataclasses.replace(load_device("pi5"), bandwidth_decode_gbs=0.001)
    view, rows = contracted(floats, slow)
    assert view is floats
    assert isinstance(view.weight(UP), Factored)
    assert [row.value for row in rows] == [14, 0]


def test_a_model_without_factors_is_left_alone(floats: Checkpoint) -> None:
    view, _ = contracted(floats, load_device("pi5"))
    assert contracted(view, None) == (view, ())


def test_the_record_has_the_decisions(floats: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    report = export(floats, folder / "small", target=TARGETS["portable"])
    assert {"factored matrices kept", "factored matrices contracted"} <= {row.name for row in report.measurements}


def test_never_slower_in_the_model_of_costs() -> None:
    device = load_device("pi5")
    large, small = (3072, 3072), (64, 64)
    assert cost_of_rank(large, 512, bits=4.5, device=device).pays_against(cost_of_dense(large, bits=4.5, device=device))
    assert not cost_of_rank(small, 8, bits=4.5, device=device).pays_against(
        cost_of_dense(small, bits=4.5, device=device)
    )
    assert not Cost(1, 10, 2, 1e-6).pays_against(Cost(9, 9, 1, 2e-6))  # a prompt would be slower
