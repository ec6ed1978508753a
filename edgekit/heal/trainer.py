"""The training loop: batches in, the best state out.

For each optimiser step: the windows that the seed gives it, in pieces of `micro_batch`; the sum of their losses over
the number of scored tokens; clip; update at the schedule's rate. Every `measure_every` steps the held-out loss is taken
(KL to the teacher at temperature 1, or the text's own where there is no teacher); the best state so far is kept, and
is what is written in the end. A step whose loss or gradient is not finite is not taken: the best state is put back
and the run stops with the step. Nothing random happens but the shuffle, which is a function of seed and step: a run
that was interrupted and goes on from its saved state computes what the uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.errors import ModelError, UserError
from edgekit.heal import losses
from edgekit.heal.data import Corpus, Split, rows_of_step
from edgekit.heal.decoder import Decoder, layer_forward
from edgekit.heal.distributed import ALONE, Group
from edgekit.heal.fake_quant import fake_quantise
from edgekit.heal.losses import Loss
from edgekit.heal.optimizers import Optimization, optimizers_for

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Training:
    """How long and in what pieces: `batch` windows a step, `micro_batch` of them at a time; see the module."""

    steps: int = 200
    batch: int = 32
    micro_batch: int = 8
    optimization: Optimization = field(default_factory=Optimization)
    loss: Loss = field(default_factory=Loss)
    measure_every: int = 25
    patience: int = 0
    seed: int = 0
    piece: int = 4096

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "measure_every", "piece"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1: got {getattr(self, name)}")
        if self.patience < 0:
            raise UserError(f"patience must be 0 (never stop early) or more: got {self.patience}")


@dataclass(frozen=True)
class Progress:
    """After a step (from 1): its loss a token, the held-out loss where it was just taken, and the pace."""

    step: int
    steps: int
    loss: float
    held_out: float | None
    best: float
    rate: float
    tokens_per_s: float
    seconds_left: float


class Task(nn.Module):  # type: ignore[misc]
    """Student, teacher and loss as one module: windows in, the sum of their losses out.

    Where `scored` is None every token but a window's first is scored, and nothing waits for the device.
    """

    def __init__(self, student: Decoder, teacher: Decoder | None, loss: Loss, piece: int) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.piece = piece
        self.piece_function = losses.piece_loss
        self._teacher = [teacher]  # in a list: it is no part of what is trained, saved or sharded

    def forward(self, ids: Tensor, scored: Tensor | None, loss: Loss | None = None) -> Tensor:
        loss = loss or self.loss
        teacher = None
        with torch.no_grad():
            if loss.needs_teacher and self._teacher[0] is not None:
                states, head = self._teacher[0](ids)
                teacher = _before(states, scored), head
        states, head = self.student(ids)
        targets = _before(ids[:, 1:, None], scored, cut=False)[:, 0]
        student = _before(states, scored), head
        return losses.total_loss(student, teacher, targets, loss, piece=self.piece, piece_function=self.piece_function)


def _before(states: Tensor, scored: Tensor | None, *, cut: bool = True) -> Tensor:
    """The rows (N, ...) that predict the scored tokens: those just before them."""
    states = states[:, :-1] if cut else states
    flat = states.reshape(-1, states.shape[-1])
    if scored is None:
        return flat
    at = scored[:, 1:]
    return flat if bool(at.all()) else flat[at.reshape(-1)]


class Trainer:
    """One training run. `state` and `restore` carry it over an interruption.

    `device` and `precision` say where products run; `group` which part of each batch this process takes.
    Raises UserError: a batch that N processes cannot share, a loss that needs a teacher without one.
    """

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder | None,
        data: Split,
        training: Training,
        *,
        device: torch.device,
        group: Group = ALONE,
        compiled: bool = False,
    ) -> None:
        if training.loss.needs_teacher and teacher is None:
            raise UserError(f"the loss {training.loss.kind} needs a teacher: name one with --teacher, or use lm")
        if training.batch % group.world:
            raise UserError(f"batch must divide by the {group.world} processes: got {training.batch}")
        self.student, self.data, self.training, self.device, self.group = student, data, training, device, group
        self.measured = Loss() if teacher is not None else Loss("lm")
        task = Task(student, teacher, training.loss, training.piece)
        if compiled:
            compile_parts(task, teacher)
        self.task = group.wrap(task.to(device))
        self.optimizers = optimizers_for(student, training.optimization)
        self.step = 0
        self.best = math.inf
        self.stale = 0
        self.best_state: dict[str, Tensor] = {}
        self.history: list[tuple[int, float, float | None]] = []

    def run(
        self,
        *,
        on_step: Callable[[Progress], None] = lambda progress: None,
        save: Callable[[Trainer], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train to the end (or until `patience` measurements brought nothing), then put the best state in place.

        `save` is called after each measurement. `stop` is asked after each step. Raises ModelError: the loss is not
        finite; the student then has its best state again.
        """
        if not self.best_state:
            self._measure()
        began, tokens, settings = time.perf_counter(), 0, self.training
        while self.step < settings.steps and not self._exhausted():
            rows = rows_of_step(len(self.data.train), self.step, settings.batch, settings.seed)
            rate = settings.optimization.rate(self.step, settings.steps)
            loss = self._train(rows, rate)
            self.step += 1
            due = self.step % settings.measure_every == 0 or self.step == settings.steps
            held_out = self._measure() if due else None
            self.history.append((self.step, loss, held_out))
            tokens += settings.batch * self.data.train.ids.shape[1]
            pace = tokens / (time.perf_counter() - began)
            left = (settings.steps - self.step) * settings.batch * self.data.train.ids.shape[1] / pace
            on_step(Progress(self.step, settings.steps, loss, held_out, self.best, rate, pace, left))
            if due and save is not None:
                save(self)
            if stop():
                return
        self._restore_best()

    def _train(self, rows: NDArray[np.int64], rate: float) -> float:
        """One optimiser step on these windows; the mean loss of a scored token over all processes."""
        batch = self.data.train[rows]
        mine = batch[np.arange(self.group.rank, len(rows), self.group.world)]
        self.optimizers.zero_grad()
        total = torch.zeros((), device=self.device)
        starts = range(0, len(mine), self.training.micro_batch)
        for start in starts:
            part = mine[slice(start, start + self.training.micro_batch)]
            last = start == starts[-1]
            with contextlib.nullcontext() if last else self.group.no_sync(self.task):
                loss = self.task(*self._tensors(part)) / batch.tokens
                (loss * self.group.world).backward()  # the group averages gradients
            total += loss.detach()
        mean = float(self.group.sum(total))
        norm = self.optimizers.clip(self.training.optimization.clip)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self._restore_best()
            raise ModelError(
                f"the loss must be finite: step {self.step + 1} gave a loss of {mean:.4g} and a gradient norm of"
                f" {norm:.4g} at a learning rate of {rate:.3g}; the best state (held-out loss {self.best:.4g}) is back"
                " in place, go on from it with a smaller --learning-rate"
            )
        self.optimizers.step(rate)
        return mean

    def _exhausted(self) -> bool:
        return 0 < self.training.patience <= self.stale

    def _measure(self) -> float:
        """The held-out loss; keeps the state when it is the best."""
        value: float = self.held_out_loss()
        if value < self.best or not self.best_state:
            self.best, self.stale = value, 0
            self.best_state = {name: part.detach().cpu().clone() for name, part in self.parameters().items()}
        else:
            self.stale += 1
        return value

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def held_out_loss(self) -> float:
        """The mean held-out loss of a scored token; infinite where it is not a number."""
        corpus: Corpus = self.data.held_out
        total = torch.zeros((), device=self.device)
        step = self.training.micro_batch * self.group.world
        for start in range(0, len(corpus), step):
            part = corpus[slice(start, start + step)]
            own = part[np.arange(self.group.rank, len(part), self.group.world)]
            mine = own if len(own) else part[slice(0, 1)]  # all processes must take part in each forward pass
            value = self.task(*self._tensors(mine), loss=self.measured)
            total += value if len(own) else torch.zeros_like(value)
        mean = float(self.group.sum(total)) / corpus.tokens
        return mean if math.isfinite(mean) else math.inf

    def _tensors(self, part: Corpus) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(part.ids.astype(np.int64)).to(self.device, non_blocking=True)
        return ids, torch.from_numpy(part.scored).to(self.device)

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name: this process's part of each."""
        return {name: _local(parameter) for parameter, name in self.optimizers.names.items()}

    def _restore_best(self) -> None:
        self.load(self.best_state)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load(self, state: dict[str, Tensor]) -> None:
        """Put values of `parameters` in place."""
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])


@functools.cache
def compiled_function(function: Callable[..., Tensor]) -> Any:
    """`function` compiled, once a process."""
    torch._dynamo.config.recompile_limit = 64  # one variant a shape of matrix, with and without gradients
    return torch.compile(function, dynamic=False)


def compile_parts(task: Task, teacher: Decoder | None) -> None:
    """Compile a layer, the rounding and the loss: once each, whatever the number of layers."""
    layer, rounding = compiled_function(layer_forward), compiled_function(fake_quantise)
    for model in (task.student, teacher):
        if model is None:
            continue
        for index in model.layers:
            index.compute = layer
        for _, matrix in model.matrices().values():
            quantiser = getattr(matrix, "quantiser", None)
            if quantiser is not None:
                quantiser.compute = rounding
    task.piece_function = compiled_function(losses.piece_loss)


def _local(parameter: Any) -> Tensor:
    """This process's part of a sharded parameter, or the parameter."""
    tensor: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return tensor
