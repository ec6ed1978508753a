"""Heal one layer after another: each learns to give what the original's layer gives, before all are trained together.

With x the original's stream before a layer and y the healed model's own, the layer f_i is trained to

    minimise   mean over tokens of |f_i(y) - f'_i(x)|**2 / |f'_i(x)|**2

so that it also makes good what the layers before it left. Gradients live in one layer at a time, and the streams are
the only thing that is kept: that is what a machine with little memory can do in minutes.
Not supported: models that lost layers, where nothing says which output a layer should have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekit.errors import UserError
from edgekit.heal.data import Corpus, rows_of_step
from edgekit.heal.decoder import Decoder, Layer

BATCH = 4  # windows a step
WINDOWS = 64  # at most; their streams are kept in memory


def heal_layers(
    student: Decoder,
    teacher: Decoder,
    corpus: Corpus,
    *,
    steps: int,
    rate: float,
    windows: int = WINDOWS,
    on_layer: Callable[[int, float, float], None] = lambda layer, before, after: None,
) -> None:
    """Train each layer of `student` for `steps` steps on the first `windows` windows of `corpus`.

    A layer that did not get better keeps its weights. `on_layer` is told the layer's error before and after.
    Raises UserError when the two models do not have the same layers.
    """
    if len(student.layers) != len(teacher.layers):
        raise UserError(
            f"healing layer by layer needs the same layers: the teacher has {len(teacher.layers)}, the student"
            f" {len(student.layers)}; leave it out and train end to end"
        )
    device = student.norm.device
    ids = torch.from_numpy(corpus.ids[:windows].astype(np.int64)).to(device)
    with torch.no_grad():
        ours = F.embedding(ids, student.embedding.weight()).float()
        theirs = F.embedding(ids, teacher.embedding.weight()).float()
    cos, sin = student.rope(ids.shape[1], device)
    for index, (layer, original) in enumerate(zip(student.layers, teacher.layers, strict=True)):
        theirs = _through(original, theirs, cos, sin)
        before, after = _heal_layer(layer, ours, theirs, cos, sin, steps=steps, rate=rate)
        ours = _through(layer, ours, cos, sin)
        on_layer(index, before, after)


def _heal_layer(
    layer: Layer, inputs: Tensor, targets: Tensor, cos: Tensor, sin: Tensor, *, steps: int, rate: float
) -> tuple[float, float]:
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    before = _mean_error(layer, inputs, targets, cos, sin)
    if not parameters:
        return before, before
    first = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rows = torch.from_numpy(rows_of_step(len(inputs), step, min(BATCH, len(inputs)), 0)).to(inputs.device)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / steps)
        optimizer.zero_grad(set_to_none=True)
        _error(layer(inputs[rows], cos, sin), targets[rows]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after = _mean_error(layer, inputs, targets, cos, sin)
    if not after < before:  # NaN counts as worse
        with torch.no_grad():
            for parameter, value in zip(parameters, first, strict=True):
                parameter.copy_(value)
        after = before
    return before, after


def _error(states: Tensor, targets: Tensor) -> Tensor:
    """The relative squared error of a token, averaged."""
    return ((states - targets).square().sum(-1) / targets.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()  # type: ignore[untyped-decorator]
def _mean_error(layer: Layer, inputs: Tensor, targets: Tensor, cos: Tensor, sin: Tensor) -> float:
    return float(_error(_through(layer, inputs, cos, sin), targets))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _through(layer: Layer, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([layer(part, cos, sin) for part in states.split(BATCH)])
