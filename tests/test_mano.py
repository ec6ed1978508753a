"""Mano step for step against the formulas in float64 NumPy loops."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def reference(W, gradients, *, lr, mu, wd, variant, nesterov):
    """The module's formulas, slice by slice."""
    W, M = W.astype(np.float64), np.zeros(W.shape)
    for t, G in enumerate(gradients):
        M = mu * M + G
        N = G + mu * M if nesterov else M
        U = np.empty_like(W)
        slices = range(W.shape[1]) if t % 2 == 0 else range(W.shape[0])
        for i in slices:
            at = (slice(None), i) if t % 2 == 0 else (i, slice(None))
            w, n = W[at], N[at]
            p = w / max(np.sqrt((w * w).sum()), 1e-8) if variant == "v1" else w
            v = n - p * (n * p).sum()
            length = np.sqrt((v * v).sum())
            U[at] = v / max(length, 1e-8) if variant == "v1" else v / (length + 1e-8)
        W = (1 - lr * wd) * W - lr * 0.2 * np.sqrt(W.shape[t % 2]) * U
    return W


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("nesterov", [None, True, False])
@pytest.mark.parametrize("shape", [(7, 5), (40, 64), (1, 6)])
def test_steps_are_those_of_the_formulas(variant, nesterov, shape):
    from edgekit.heal.mano import Mano

    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape)
    gradients = [rng.standard_normal(shape) for _ in range(5)]
    parameter = torch.nn.Parameter(torch.from_numpy(W.copy()))
    optimizer = Mano([parameter], lr=0.03, momentum=0.9, weight_decay=0.1, variant=variant, nesterov=nesterov, thin=0)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    chosen = variant == "v2" if nesterov is None else nesterov
    expected = reference(W, gradients, lr=0.03, mu=0.9, wd=0.1, variant=variant, nesterov=chosen)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_an_update_has_a_root_mean_square_of_a_fifth_of_the_rate():
    from edgekit.heal.mano import Mano

    W = torch.nn.Parameter(torch.randn(64, 96, dtype=torch.float64))
    before = W.detach().clone()
    W.grad = torch.randn_like(W)
    Mano([W], lr=0.5).step()
    assert float((W.detach() - before).square().mean().sqrt()) == pytest.approx(0.1, rel=1e-9)


def test_thin_factors_use_their_long_slices_only():
    from edgekit.heal.mano import Mano

    W = torch.nn.Parameter(torch.randn(8, 200, dtype=torch.float64))
    optimizer = Mano([W], lr=0.1)
    for _ in range(2):
        before = W.detach().clone()
        W.grad = torch.randn_like(W)
        optimizer.step()
        rows = (W.detach() - before).norm(dim=1)
        torch.testing.assert_close(rows, torch.full_like(rows, 0.1 * 0.2 * 200**0.5))


def test_what_is_no_matrix_or_out_of_range_is_refused():
    from edgekit.heal.mano import Mano

    with pytest.raises(UserError, match="Mano is for matrices"):
        Mano([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UserError, match="momentum from 0"):
        Mano([torch.nn.Parameter(torch.zeros(3, 3))], momentum=1.0)
    with pytest.raises(UserError, match="v1 or v2"):
        Mano([torch.nn.Parameter(torch.zeros(3, 3))], variant="v3")  # type: ignore[arg-type]
