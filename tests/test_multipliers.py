"""Learnable multipliers: where they stand, their gradients, and that folding changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def randomised(multipliers):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in multipliers.parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return multipliers


def test_gradients_are_those_of_the_paper():
    from edgekit.heal.multipliers import Multipliers

    W, G = torch.randn(5, 7), torch.randn(5, 7)
    m = randomised(Multipliers((5, 7), rows=True, columns=True))
    (m(W) * G).sum().backward()
    r, c = m.row.detach(), m.column.detach()
    torch.testing.assert_close(m.row.grad, (W * c * G).sum(1))
    torch.testing.assert_close(m.column.grad, (r[:, None] * W * G).sum(0))


@pytest.mark.parametrize("placement", ["scalar", "minimal", "full"])
def test_folding_a_float_matrix_is_exact(placement):
    from edgekit.heal.matrix import Matrix
    from edgekit.heal.multipliers import multipliers_for

    matrix = Matrix(torch.randn(6, 40))
    matrix.multipliers = randomised(multipliers_for("o", matrix.shape, placement))
    np.testing.assert_array_equal(matrix.fold().dense(), matrix.weight().detach().numpy())


@pytest.mark.parametrize("offset", ["zero", "minimum", "symmetric"])
def test_rows_fold_into_the_scales_of_fixed_codes(offset):
    from edgekit.heal.matrix import FixedCodes
    from edgekit.heal.multipliers import multipliers_for
    from edgekit.quant.grid import Grid, round_to_grid

    W = np.random.default_rng(0).standard_normal((6, 70)).astype(np.float32)
    stored = round_to_grid(W, Grid(4, 32, offset), where="w")
    matrix = FixedCodes(stored)
    np.testing.assert_array_equal(matrix.weight().numpy(), stored.dense())
    matrix.multipliers = randomised(multipliers_for("o", matrix.shape, "full", fixed_codes=True))
    folded = matrix.fold()
    np.testing.assert_array_equal(folded.codes, stored.codes)
    np.testing.assert_array_equal(folded.dense(), matrix.weight().detach().numpy())
    assert not np.array_equal(folded.scales, stored.scales)


def test_the_placement_table():
    from edgekit.heal.multipliers import multipliers_for

    def sides(role, placement):
        found = multipliers_for(role, (4, 8), placement)
        return "" if found is None else "r" * (found.row is not None) + "c" * (found.column is not None)

    roles = ("o", "q", "k", "v", "down", "gate", "up", "embedding", "head")
    assert [sides(role, "minimal") for role in roles] == ["rc", "r", "", "", "rc", "r", "", "rc", ""]
    assert [sides(role, "full") for role in roles] == ["rc"] * 8 + [""]
    with pytest.raises(UserError, match="multipliers must be"):
        multipliers_for("q", (4, 8), "some")  # type: ignore[arg-type]


def test_the_clip_norm_leaves_multipliers_out(tmp_path):
    from tiny import tiny_folder

    from edgekit.heal.decoder import Decoder
    from edgekit.heal.multipliers import multipliers_for
    from edgekit.heal.optimizers import Optimization, optimizers_for
    from edgekit.model.sources import open_path

    model = Decoder(open_path(tiny_folder(tmp_path / "m")))
    for role, matrix in model.matrices().values():
        matrix.multipliers = multipliers_for(role, matrix.shape, "full")
    optimizers = optimizers_for(model, Optimization())
    for parameter, name in optimizers.names.items():
        parameter.grad = torch.full_like(parameter, 1e6 if ".multipliers." in name else 0.0)
    assert optimizers.clip(1.0) == 0.0
    decay = {
        group["weight_decay"] for part in optimizers.parts for group in part.param_groups
        if any(".multipliers." in optimizers.names[p] for p in group["params"])
    }  # fmt: skip
    assert decay == {2e-3}
