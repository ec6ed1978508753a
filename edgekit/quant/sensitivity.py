"""How much each matrix's rounding will change what the model says: a second-order estimate from one backward pass.

For an error E in a matrix W that reads x_t and whose outputs have the gradients g_t, the model's next-token
distributions move by about (mean over tokens, in nats)

    KL = 1/2 mean_t (g_t . E x_t)^2  ~  1/2 sum_i r_i (E G E^T)_ii

    G = mean_t w_t x_t x_t^T,   w_t = mean_i g_ti^2,   r_i = mean_t g_ti^2 / mean_ti g_ti^2

with g of the log-likelihood of tokens drawn from the model itself (so that this is its Fisher information and not the
text's). It takes errors of different outputs, tokens and matrices as independent. Weighting each token's input by its
gradient matters: the first tokens of a text have the largest activations of all and hardly any influence.

A token table adds 1/2 mean_t sum_j g_tj^2 E_(id_t, j)^2 where it is looked up, and as the head, with p_t the model's
distribution, 1/2 sum_i mean_t p_ti (1 - p_ti) (E H E^T)_ii.

Blocks are run forward once, their inputs kept (they may spill), and then backward one at a time: memory holds one.
Source: the estimate is that of Kronecker-factored curvature, Martens and Grosse, arXiv 1503.05671, with a diagonal
output factor; token weights as in GuidedQuant, Kim et al., arXiv 2505.07004.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.calibrate import TABLE, Survey
from edgekit.checkpoint import Block
from edgekit.errors import ModelError
from edgekit.model.calibration import FINAL_NORM, LayerInputs
from edgekit.model.config import DecoderConfig
from edgekit.model.torch_view import Layer, rms_norm
from edgekit.weight import Floats

Doubles = NDArray[np.float64]
TOKENS_AT_ONCE = 256  # whose logits are in memory together
WINDOWS = 6
HEAD = "lm_head"


@dataclass(frozen=True)
class Sample:
    """Some rows of a matrix, and weights with which sums over them estimate, without bias, sums over all."""

    rows: NDArray[np.int64]
    weights: Doubles


@dataclass(frozen=True)
class Curvature:
    """Of one matrix: G (in, in) and r (out,) of the module's text, float64; `looked_up` (out, in) for a token table."""

    inputs: Doubles
    outputs: Doubles
    looked_up: Floats | None = None

    def loss(self, error: Floats, sample: Sample | None = None) -> float:
        """The KL, in nats a token, that an error (out, in) will make; `error` holds the rows of `sample` where given,
        and the loss is then estimated from them."""
        outputs, looked_up = self.outputs, self.looked_up
        if sample is not None:
            outputs = outputs[sample.rows]
            looked_up = None if looked_up is None else looked_up[sample.rows]
        rows = np.empty(len(error))
        for start in range(0, len(error), 4096):
            part = error[start : start + 4096]
            rows[start : start + 4096] = np.einsum("ij,ij->i", part @ self.inputs.astype(np.float32), part)
        rows *= outputs
        if looked_up is not None:
            rows += np.einsum("ij,ij,ij->i", looked_up, error, error)
        return 0.5 * float(rows.sum() if sample is None else rows @ sample.weights)

    def sample(self, count: int) -> Sample | None:
        """About `count` rows, drawn in proportion to what white noise in them would cost; None where that is no fewer.

        The draw is systematic, so it needs no seed: row i is taken at each step of 1 / count that its share covers.
        """
        share = self.outputs * float(self.inputs.trace())
        if self.looked_up is not None:
            share = share + self.looked_up.sum(1, dtype=np.float64)
        if len(share) <= count or not share.sum() > 0:
            return None
        share = share / share.sum()
        ends = (np.arange(count) + 0.5) / count
        drawn = np.searchsorted(np.cumsum(share), ends).clip(max=len(share) - 1)
        rows, times = np.unique(drawn, return_counts=True)
        return Sample(rows, times / (count * share[rows]))


def curvatures(survey: Survey, *, seed: int) -> Iterator[tuple[Block, dict[str, Curvature], dict[str, Doubles]]]:
    """Each block, from the last to the first, with the curvature of its matrices and mean squares of their inputs."""
    with torch.enable_grad():
        yield from _Backward(survey, seed)()


class _Backward:
    def __init__(self, survey: Survey, seed: int) -> None:
        self.survey = survey
        self.ids = survey.windows.ids[:WINDOWS]
        self.compute = survey.room.compute
        self.draw = torch.Generator(self.compute).manual_seed(seed)
        self.total = 2 * len(survey.names)
        self.done = 0

    def __call__(self) -> Iterator[tuple[Block, dict[str, Curvature], dict[str, Doubles]]]:
        depths, embedding, final = self._forward()
        head, gradient = self._head(final, embedding, depths.pop())
        tied = HEAD not in final.matrices
        yield final, {} if tied else {HEAD: head}, {} if tied else {HEAD: head.inputs.diagonal()}
        names = [name for name in self.survey.names if name.startswith("layers.")]
        for name in reversed(names):
            block = self.survey.block(name)
            found, squares = self._layer(block, depths.pop(), gradient)
            self._step()
            yield block, found, squares
        table = self._table(embedding, gradient, head if tied else None)
        yield embedding, {TABLE: table}, {TABLE: head.inputs.diagonal() if tied else np.ones(gradient.shape[-1])}

    def _step(self) -> None:
        self.done += 1
        self.survey.report(self.done, self.total)

    def _forward(self) -> tuple[list[Floats], Block, Block]:
        """What each layer and the head read, and the two blocks around the layers."""
        embedding = self.survey.block("embedding")
        final = self.survey.block("final")
        table = embedding.matrices[TABLE].dense()
        samples, length = self.ids.shape
        depths = [self.survey.room.take((samples, length, table.shape[1]))]
        depths[0][:] = table[self.ids]
        with torch.no_grad():
            for name in self.survey.names:
                if name.startswith("layers."):
                    inputs = LayerInputs(depths[-1], self.survey.decoder, self.survey.room)
                    depths.append(inputs.output(self.survey.block(name)))
                self._step()
        return depths, embedding, final

    def _head(self, final: Block, embedding: Block, states: Floats) -> tuple[Curvature, Floats]:
        """The curvature of the head, and the gradient of the states before the final norm."""
        weight = final.matrices.get(HEAD, embedding.matrices[TABLE])
        W, gain = self._tensor(weight.dense()), self._tensor(final.vectors[FINAL_NORM])
        gradient = np.empty(states.shape, np.float32)
        gram, outputs = W.new_zeros(W.shape[1], W.shape[1], dtype=torch.float64), W.new_zeros(len(W))
        count = states.shape[0] * states.shape[1]
        for sample, start in np.ndindex(states.shape[0], -(-states.shape[1] // TOKENS_AT_ONCE)):
            part = slice(start * TOKENS_AT_ONCE, (start + 1) * TOKENS_AT_ONCE)
            x = self._tensor(states[sample, part]).requires_grad_()
            normed = rms_norm(x, gain, self.survey.decoder.norm_eps)
            logits = normed @ W.T
            p = torch.softmax(logits.detach(), dim=-1)
            if not torch.isfinite(p).all():
                raise ModelError("the model's logits must be finite on the calibration text: the weights are damaged")
            drawn = torch.multinomial(p, 1, generator=self.draw)[:, 0]
            (found,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), x)
            gradient[sample, part] = found.numpy(force=True)
            rows = normed.detach()
            gram += (rows.T @ rows).double()
            outputs += (p * (1 - p)).sum(0)
        return Curvature(_doubles(gram / count), _doubles(outputs / count)), gradient

    def _layer(self, block: Block, states: Floats, gradient: Floats) -> tuple[dict[str, Curvature], dict[str, Doubles]]:
        """The curvatures of one layer's matrices; `gradient` becomes that of its input, in place."""
        layer = _tapped(block, self.survey.decoder, self.compute)
        prefix = f"model.{block.name}."
        grams: dict[str, Any] = {}
        for sample in range(len(states)):
            x = self._tensor(states[sample : sample + 1]).requires_grad_()
            layer.taps.clear()
            y = layer(x)
            wanted = self._tensor(gradient[sample : sample + 1])
            outputs = [output for _, _, output in layer.taps]
            before, *found = torch.autograd.grad(y, [x, *outputs], wanted)
            gradient[sample] = before[0].numpy(force=True)
            for (leaf, given, _), g in zip(layer.taps, found, strict=True):
                rows, square = given.detach().flatten(0, 1), g.flatten(0, 1).square()
                sums = (
                    ((rows * square.mean(1, keepdim=True)).T @ rows).double(),
                    square.sum(0, dtype=torch.float64),
                    rows.square().sum(0, dtype=torch.float64),
                )
                held = grams.get(prefix + leaf)
                grams[prefix + leaf] = sums if held is None else tuple(a + b for a, b in zip(held, sums, strict=True))
        count = states.shape[0] * states.shape[1]
        curved = {
            module: Curvature(_doubles(gram / count), _doubles(square / square.mean().clamp_min(1e-300)))
            for module, (gram, square, _) in grams.items()
        }
        return curved, {module: _doubles(power / count) for module, (_, _, power) in grams.items()}

    def _tensor(self, array: Floats) -> Tensor:
        """A copy: states and gradients are overwritten."""
        return torch.from_numpy(np.array(array)).to(self.compute)

    def _table(self, embedding: Block, gradient: Floats, head: Curvature | None) -> Curvature:
        """The curvature of the token table: looked up, and as the head where it is tied."""
        rows, width = embedding.matrices[TABLE].shape
        looked_up = np.zeros((rows, width), np.float32)
        np.add.at(looked_up, self.ids.reshape(-1), np.square(gradient).reshape(-1, width) / self.ids.size)
        if head is None:
            return Curvature(np.zeros((width, width)), np.zeros(rows), looked_up)
        return Curvature(head.inputs, head.outputs, looked_up)


@dataclass(frozen=True)
class _Tapped(Layer):
    """A layer that remembers what each of its linears read and gave."""

    taps: list[tuple[str, Tensor, Tensor]]

    def linear(self, leaf: str, x: Tensor) -> Tensor:
        y = super().linear(leaf, x)
        self.taps.append((leaf, x, y))
        return y


def _doubles(values: Tensor) -> Doubles:
    exact: Doubles = values.double().numpy(force=True)
    return exact


def _tapped(block: Block, config: DecoderConfig, compute: torch.device) -> _Tapped:
    layer = Layer.of(block, config, compute)
    return _Tapped(config, layer.matrices, layer.biases, layer.norms, layer.heads, [])
