"""Which optimiser trains which parameter, and the learning rate over time.

    matrices of the layers                 the chosen optimiser: AdamW, Muon (torch's own), Mano v1 or v2
    embedding, head                        AdamW at the same learning rate
    norms, biases                          AdamW, no weight decay
    scales and offsets of grids            AdamW, no weight decay: they are factors near one, or in units of a code
    multipliers                            AdamW, weight decay 2e-3, not counted in the norm that is clipped

AdamW has betas 0.9 and 0.95; Muon is scaled to AdamW's update size ("match_rms_adamw"), as Mano is by its formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from edgekit.errors import UserError
from edgekit.heal import multipliers
from edgekit.heal.decoder import Decoder
from edgekit.heal.mano import Mano

Optimizer = Literal["adamw", "muon", "mano", "mano-v2"]
Schedule = Literal["cosine", "linear", "constant"]
Role = Literal["matrix", "embedding", "vector", "grid", "multiplier"]
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Optimization:
    """The optimiser, its highest learning rate, weight decay of matrices, the schedule, and the clip norm (0: none)."""

    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup: int = 20
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("optimizer", self.optimizer, get_args(Optimizer)),
            ("schedule", self.schedule, get_args(Schedule)),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}: got {value!r}")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"learning_rate must be above 0 and below 1: got {self.learning_rate}")
        if not 0 <= self.weight_decay < 1:
            raise UserError(f"weight_decay must be from 0 to below 1: got {self.weight_decay}")
        if self.warmup < 0 or not self.clip >= 0:
            raise UserError(f"warmup and clip must be 0 or more: got {self.warmup} and {self.clip}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0): a linear rise, then to a hundredth of the highest at the end."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, steps - self.warmup)
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (0.01 + 0.99 * left)


def role_of(name: str, parameter: Tensor) -> Role:
    """What a parameter of `Decoder` is, by its name."""
    if ".multipliers." in name:
        return "multiplier"
    if ".quantiser." in name:
        return "grid"
    if parameter.ndim != 2:
        return "vector"
    return "embedding" if name.startswith(("embedding.", "lm_head.")) else "matrix"


@dataclass(frozen=True)
class Optimizers:
    """The optimisers of one training; together they hold every trainable parameter once."""

    parts: tuple[torch.optim.Optimizer, ...]
    names: dict[Tensor, str]
    clipped: tuple[nn.Parameter, ...]

    def step(self, rate: float) -> None:
        """One update at this learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def clip(self, limit: float) -> float:
        """Scale the gradients down to a norm of `limit` (0: leave them); the norm before, multipliers not counted."""
        gradients = [parameter.grad for parameter in self.clipped if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if limit:
            everything = [parameter for parameter in self.names if parameter.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(everything, limit, norm)
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors: `parameter:key`."""
        return {
            f"{self.names[parameter]}:{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def counters(self) -> list[int]:
        """Steps that groups count themselves, in order."""
        return [group.get("steps", 0) for part in self.parts for group in part.param_groups]

    def restore(self, tensors: dict[str, Tensor], counters: list[int]) -> None:
        """Take over what `tensors` and `counters` gave."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {parameter: part for part in self.parts for group in part.param_groups for parameter in group["params"]}
        for key, value in tensors.items():
            name, _, leaf = key.rpartition(":")
            owner[by_name[name]].state[by_name[name]][leaf] = value
        groups = [group for part in self.parts for group in part.param_groups]
        for group, count in zip(groups, counters, strict=True):
            if "steps" in group:
                group["steps"] = count


def optimizers_for(model: Decoder, options: Optimization) -> Optimizers:
    """The optimisers for all parameters of `model` that need gradients. Raises UserError when there are none."""
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise UserError("there must be something to train: the chosen part of the model has no parameters")
    by_role: dict[Role, list[nn.Parameter]] = {}
    for parameter, name in names.items():
        by_role.setdefault(role_of(name, parameter), []).append(parameter)
    decay = {"embedding": options.weight_decay, "multiplier": multipliers.WEIGHT_DECAY}
    matrices = by_role.pop("matrix", [])
    adam: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay.get(role, 0.0)} for role, parameters in by_role.items()
    ]
    parts: list[torch.optim.Optimizer] = []
    lr, wd = options.learning_rate, options.weight_decay
    if matrices and options.optimizer == "adamw":
        adam.append({"params": matrices, "weight_decay": wd})
    elif matrices and options.optimizer == "muon":
        parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=wd, adjust_lr_fn="match_rms_adamw"))
    elif matrices:
        variant: Literal["v1", "v2"] = "v2" if options.optimizer == "mano-v2" else "v1"
        parts.append(Mano(matrices, lr=lr, weight_decay=wd, variant=variant))
    if adam:
        fused = any(parameter.is_cuda for parameter in names)
        parts.append(torch.optim.AdamW(adam, lr=lr, betas=BETAS, eps=1e-8, fused=fused))
    counted = tuple(p for p, name in names.items() if role_of(name, p) != "multiplier")
    return Optimizers(tuple(parts), names, counted)
