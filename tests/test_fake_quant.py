"""Training through grids: gradients, and that the exported integers are those that the forward pass used."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import ModelError, UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

GRIDS = [
    (bits, block, offset, scales)
    for bits in (2, 3, 4, 8)
    for block in (32, 64)
    for offset in ("zero", "minimum", "none")
    for scales in ("float16", "int8")
]


def trained(bits, block, offset, scales="float16", columns=80):
    """A matrix after a few steps of training on its grid."""
    from edgekit.heal.fake_quant import FakeQuant, Levels

    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.randn(6, columns) * 0.05)
    target = torch.randn(6, columns) * 0.05
    quantiser = FakeQuant.fit(W, Levels(bits, block, offset, scales))
    optimizer = torch.optim.AdamW([W, *quantiser.parameters()], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (quantiser(W) - target).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return W, quantiser, losses


@pytest.mark.parametrize(("bits", "block", "offset", "scales"), GRIDS)
def test_the_exported_integers_are_exactly_those_trained(bits, block, offset, scales):
    W, quantiser, losses = trained(bits, block, offset, scales)
    assert losses[-1] < losses[0]
    weight = quantiser.to_weight(W)
    np.testing.assert_array_equal(weight.dense(), quantiser(W).detach().numpy())
    assert weight.bits == bits
    assert weight.block == block


@pytest.mark.parametrize(("bits", "block", "offset", "scales"), GRIDS)
def test_a_stored_matrix_is_taken_up_without_change(bits, block, offset, scales):
    from edgekit.heal.fake_quant import FakeQuant

    W, quantiser, _ = trained(bits, block, offset, scales)
    stored = quantiser.to_weight(W)
    again = FakeQuant.of(stored)
    np.testing.assert_array_equal(again(torch.from_numpy(stored.dense())).detach().numpy(), stored.dense())
    np.testing.assert_array_equal(again.to_weight(torch.from_numpy(stored.dense())).codes, stored.codes)


def test_gradients_are_those_of_the_formulas():
    from edgekit.heal.fake_quant import FakeQuant, Levels

    s, z, top = 0.5, 1.0, 7
    w = np.linspace(-2, 5, 32).astype(np.float32)
    W = torch.tensor(w[None], requires_grad=True)
    quantiser = FakeQuant(Levels(3, 32, "zero"), torch.tensor([[s]]), torch.tensor([[z]]))
    G = torch.randn(1, 32)
    (quantiser(W) * G).sum().backward()
    q = np.round(w / s) + z
    inside = (q >= 0) & (q <= top)
    code = np.clip(q, 0, top)
    g = G.numpy()[0]
    np.testing.assert_allclose(W.grad[0], np.where(inside, g, 0), rtol=1e-6)
    slope = np.where(inside, code - z - w / s, code - z)
    assert float(quantiser.factor.grad) == pytest.approx(float((g * slope).sum() * s), rel=1e-4)
    assert float(quantiser.offset.grad) == pytest.approx(float(-s * g[~inside].sum()), rel=1e-4)


def test_a_zero_block_stays_zero():
    from edgekit.heal.fake_quant import FakeQuant, Levels

    W = torch.zeros(2, 32)
    for offset in ("zero", "minimum", "none"):
        quantiser = FakeQuant.fit(W, Levels(3, 32, offset))
        assert not quantiser(W).detach().any()
        assert not quantiser.to_weight(W).dense().any()


def test_what_cannot_be_a_grid_is_refused():
    from edgekit.heal.fake_quant import FakeQuant, Levels

    for arguments, text in (((7, 32, "zero"), "bits"), ((3, 33, "zero"), "block"), ((3, 32, "float"), "offset")):
        with pytest.raises(UserError, match=text):
            Levels(*arguments)
    quantiser = FakeQuant.fit(torch.ones(1, 32), Levels(3, 32, "zero"))
    with pytest.raises(ModelError, match="finite"):
        quantiser.to_weight(torch.full((1, 32), torch.nan))
