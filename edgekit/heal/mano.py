"""Mano: momentum projected on the tangent of the weights' manifold, as a torch optimiser for matrices.

For each matrix W (m, n) with gradient G and momentum buffer M (zero at first), step t = 0, 1, ... works along one axis:
k = t mod 2; for k = 0 the slices are columns (norms over the m rows), for k = 1 they are rows. With <.,.>_k and ||.||_k
the inner product and the norm of each slice, eps = 1e-8 and n_k the slices' length:

    M <- mu M + G                                           heavy ball; N = G + mu M with Nesterov, else N = M
    V = N - P <N, P>_k     P = W / max(||W||_k, eps) in v1,   P = W itself in v2
    U = V / max(||V||_k, eps) in v1,                          V / (||V||_k + eps) in v2
    W <- (1 - lr wd) W - 0.2 lr sqrt(n_k) U

So an update's root mean square is 0.2 lr, as AdamW's is in practice, and learning rates carry over. Nesterov is off in
v1 and on in v2, as the authors ship them; either can be chosen.

A slice of a thin factor is a noisy direction: normalising a row of r numbers, r small, makes each of them as large as
any other. Where the shorter side of a matrix is below `thin`, only the longer slices are used, at every step.
Source: arXiv 2601.23000, algorithm 1, and the authors' code for the order of the axes, on which the paper contradicts
itself. Not supported: tensors of other than two dimensions; embeddings, heads and vectors belong to AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from edgekit.errors import UserError

Variant = Literal["v1", "v2"]
EPS = 1e-8


class Mano(torch.optim.Optimizer):  # type: ignore[misc]
    """The optimiser of the module's text for matrices.

    Arguments: `lr`, `momentum` mu, `weight_decay` wd; `variant`; `nesterov`, by default that of the variant; `thin`.
    Raises UserError: an option out of range, a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        variant: Variant = "v1",
        nesterov: bool | None = None,
        thin: int = 32,
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
            raise UserError(
                f"Mano needs lr >= 0, momentum from 0 to below 1, weight_decay >= 0: got {lr}, {momentum},"
                f" {weight_decay}"
            )
        if variant not in ("v1", "v2"):
            raise UserError(f"Mano's variant must be v1 or v2: got {variant!r}")
        chosen = variant == "v2" if nesterov is None else nesterov
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "variant": variant}
        super().__init__(params, {**defaults, "nesterov": chosen, "thin": thin, "steps": 0})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise UserError(f"Mano is for matrices: got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; a parameter without a gradient stays, and the group's axis turns all the same."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                _update(parameter, parameter.grad, state["momentum"], group)
            group["steps"] += 1
        return loss


def _update(W: Tensor, G: Tensor, M: Tensor, group: dict[str, Any]) -> None:
    M.mul_(group["momentum"]).add_(G)
    N = G + group["momentum"] * M if group["nesterov"] else M
    axis = _axis(W.shape, group["steps"], group["thin"])
    U = direction(W, N, axis=axis, variant=group["variant"])
    W.mul_(1 - group["lr"] * group["weight_decay"])
    W.sub_(U, alpha=group["lr"] * 0.2 * W.shape[axis] ** 0.5)


def _axis(shape: Any, step: int, thin: int) -> int:
    """The axis to take norms over: 0 and 1 in turn, but the longer one of a thin matrix."""
    if min(shape) < thin and shape[0] != shape[1]:
        return 0 if shape[0] > shape[1] else 1
    return step % 2


def direction(W: Tensor, N: Tensor, *, axis: int, variant: Variant) -> Tensor:
    """U of the module's text: the momentum N without its part along W, each slice over `axis` of length one."""
    first = variant == "v1"
    P = W / W.norm(dim=axis, keepdim=True).clamp_min(EPS) if first else W
    V = N - P * (N * P).sum(dim=axis, keepdim=True)
    length = V.norm(dim=axis, keepdim=True)
    return V / (length.clamp_min(EPS) if first else length + EPS)
