"""Which factors a bundle keeps: those that are predicted no slower, each with its reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_tn_steps import UP, made

from edgekit.checkpoint import Checkpoint
from edgekit.device import load_device
from edgekit.export.contract import contracted
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.model.reference import forward
from edgekit.tn.cost import Cost, cost_of_dense, cost_of_rank
from edgekit.weight import Dense, Factored, Quantized


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made(tmp_path_factory.mktemp("floats"), "keep = 0.6\nmultiple = 1")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made(tmp_path_factory.mktemp("rounded"), 'keep = 0.9\n[[step]]\nuse = "quant.int8"\n')


def test_small_factors_are_multiplied_out(floats: Checkpoint) -> None:
    view, rows = contracted(floats, load_device("pi5"))
    assert isinstance(view.weight(UP), Dense)
    np.testing.assert_array_equal(view.weight(UP).dense(), floats.weight(UP).dense())
    ids = [[3, 4, 5, 6]]
    np.testing.assert_allclose(forward(view, ids)[0], forward(floats, ids)[0], atol=1e-5)
    assert [row.value for row in rows] == [0, 14]
    assert f"{UP} contracted" in rows[1].note


def test_rounded_factors_become_eight_bits(rounded: Checkpoint) -> None:
    view, rows = contracted(rounded, load_device("pi5"))
    weight = view.weight(UP)
    assert isinstance(weight, Quantized)
    assert weight.bits == 8
    np.testing.assert_allclose(weight.dense(), rounded.weight(UP).dense(), atol=0.01)
    assert rows[1].value


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
