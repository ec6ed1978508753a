"""What healing minimises, for each scored position of a sequence, with p the teacher's and q the student's distribution
over the next token, both at temperature T:

    kl         T**2 * sum_v p_v log(p_v / q_v)
    kl_top     the same over the teacher's k most likely tokens and one more outcome for all the rest: k + 1 terms.
               By the log-sum inequality never above the full one, and all a teacher's logits that a file need hold
    lm         - log q(next token of the text), no teacher
    hidden     |h - h'|**2 / |h'|**2 of the final normed states (the two models must have one width)

Sources: Hinton et al., arXiv 1503.02531, for T; `hidden` as in Romero et al., FitNets, arXiv 1412.6550, made relative.
Logits are made a piece at a time, so that memory holds `PIECE` rows of the vocabulary and not a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from edgekit.errors import UserError

Kind = Literal["kl", "kl_top", "lm", "hidden"]


@dataclass(frozen=True)
class Loss:
    """Which loss: `kind`, the temperature of kl and kl_top, the k of kl_top, and the weight of `hidden` beside it."""

    kind: Kind = "kl"
    temperature: float = 1.0
    top: int = 64
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"loss must be one of {', '.join(get_args(Kind))}: got {self.kind!r}")
        if not 0 < self.temperature < 100:
            raise UserError(f"temperature must be above 0 and below 100: got {self.temperature}")
        if self.top < 1:
            raise UserError(f"top must be at least 1: got {self.top}")
        if not 0 <= self.hidden_weight < 1e6:
            raise UserError(f"hidden_weight must be 0 or more: got {self.hidden_weight}")

    @property
    def needs_teacher(self) -> bool:
        return self.kind != "lm" or self.hidden_weight > 0


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over the rows of T**2 KL(p || q); logits (N, vocabulary), computed in float32."""
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def kl_top(student: Tensor, teacher: Tensor, top: int, temperature: float = 1.0) -> Tensor:
    """The same over the teacher's `top` most likely tokens and one outcome for the rest."""
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    if top >= log_p.shape[-1]:
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    chosen, index = log_p.topk(top, dim=-1)
    ours = log_q.gather(-1, index)
    rest_p, rest_q = _log_rest(chosen), _log_rest(ours)
    terms = (chosen.exp() * (chosen - ours)).sum() + (rest_p.exp() * (rest_p - rest_q)).sum()
    return temperature**2 * terms


def _log_rest(log_chosen: Tensor) -> Tensor:
    """log(1 - sum exp), from below bounded by float32's resolution."""
    return torch.log1p(-log_chosen.exp().sum(-1).clamp_max(1 - 1e-7))


Tail = tuple[Tensor, Tensor]  # final normed states (N, hidden) of the scored positions, head (vocabulary, hidden)
PieceLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Loss], Tensor]


def piece_loss(h: Tensor, W: Tensor, teacher_h: Tensor, teacher_W: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """The sum of the logits' loss over some scored positions."""
    logits = h.to(W.dtype) @ W.T
    if loss.kind == "lm":
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    with torch.no_grad():
        theirs = teacher_h.to(teacher_W.dtype) @ teacher_W.T
    if loss.kind == "kl_top":
        return kl_top(logits, theirs, loss.top, loss.temperature)
    return kl(logits, theirs, loss.temperature)


def total_loss(
    student: Tail,
    teacher: Tail | None,
    targets: Tensor,
    loss: Loss,
    *,
    piece: int,
    piece_function: PieceLoss = piece_loss,
) -> Tensor:
    """The sum of the loss over N scored positions; `targets`: (N,) the tokens that follow them."""
    h, W = student
    their_h, their_W = teacher if teacher is not None else (h.detach(), W.detach())
    total = torch.zeros((), device=h.device)
    if loss.kind != "hidden":
        for start in range(0, len(h), piece):
            part = slice(start, start + piece)
            arguments = (h[part], W, their_h[part], their_W, targets[part], loss)
            if torch.is_grad_enabled() and len(h) > piece:
                total = total + recompute(piece_function, *arguments, use_reentrant=False)
            else:
                total = total + piece_function(*arguments)
    weight = 1.0 if loss.kind == "hidden" else loss.hidden_weight
    if weight and teacher is not None:
        total = total + weight * ((h - their_h).square().sum(-1) / their_h.square().sum(-1).clamp_min(1e-12)).sum()
    return total
