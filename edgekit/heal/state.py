"""Saved training states: what an interrupted run goes on from, as plain files.

    state-STEP-of-RANK.safetensors    parameters, the best ones so far, and the optimisers' state: this process's part
    state.json                        identity of the run, step, best loss, history; written last: it names whole files

Each process writes its own file, so a state of N processes is in N shards. A state is gone on from only where model,
data, options and the number of processes are the same; then the numbers are those of a run that was not interrupted.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from edgekit.errors import ModelError, UserError
from edgekit.folder import sync, write_file
from edgekit.heal.trainer import Trainer
from edgekit.schema import parse

NAME = "state.json"


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on: digests of student, teacher and data, the options, the processes."""

    student: str
    teacher: str
    data: str
    options: str
    processes: int


@dataclass(frozen=True)
class Record:
    """`state.json`. `best` is null while nothing finite was measured."""

    identity: Identity
    step: int
    best: float | None
    stale: int
    counters: tuple[int, ...]
    losses: tuple[float, ...] = field(default=())
    held_out: tuple[float | None, ...] = field(default=())


def save(trainer: Trainer, folder: Path, identity: Identity) -> None:
    """Write the trainer's state to `folder`, in place of an earlier one."""
    tensors = {f"now:{name}": value for name, value in trainer.parameters().items()}
    tensors |= {f"best:{name}": value for name, value in trainer.best_state.items()}
    tensors |= {f"optimizer:{name}": _local(value) for name, value in trainer.optimizers.tensors().items()}
    path = _shard(folder, trainer.step, trainer.group.rank)
    partial = path.with_suffix(".partial")
    try:
        safetensors.torch.save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path)
    trainer.group.barrier()
    if trainer.group.rank == 0:
        record = Record(
            identity=identity,
            step=trainer.step,
            best=trainer.best if math.isfinite(trainer.best) else None,
            stale=trainer.stale,
            counters=tuple(trainer.optimizers.counters()),
            losses=tuple(loss for _, loss, _ in trainer.history),
            held_out=tuple(value for _, _, value in trainer.history),
        )
        write_file(folder / NAME, json.dumps(asdict(record)).encode())
    trainer.group.barrier()
    for old in folder.glob(f"state-*-{trainer.group.rank}.safetensors"):
        if old != path:
            old.unlink()


def restore(trainer: Trainer, folder: Path, identity: Identity) -> bool:
    """Put the state of `folder` into the trainer; False when there is none.

    Raises UserError: it is of another model, data, options or number of processes; ModelError: it is broken.
    """
    path = folder / NAME
    if not path.exists():
        return False
    try:
        record = parse(Record, json.loads(path.read_text()), where=str(path), error=ModelError)
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path} must be readable JSON: {problem}; start anew without --resume") from problem
    for name, ours in asdict(identity).items():
        theirs = getattr(record.identity, name)
        if theirs != ours:
            raise UserError(
                f"a run goes on with the same {name}: {folder} was begun with {theirs}, this is {ours};"
                " start anew without --resume"
            )
    shard = _shard(folder, record.step, trainer.group.rank)
    try:
        tensors = safetensors.torch.load_file(shard)
    except (OSError, safetensors.SafetensorError) as problem:
        raise ModelError(
            f"{shard} must be a whole safetensors file: {problem}; start anew without --resume"
        ) from problem
    by_kind: dict[str, dict[str, torch.Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        by_kind[kind][name] = value
    trainer.load(by_kind["now"])
    trainer.best_state = by_kind["best"]
    trainer.optimizers.restore(by_kind["optimizer"], list(record.counters))
    trainer.step, trainer.stale = record.step, record.stale
    trainer.best = math.inf if record.best is None else record.best
    trainer.history = [
        (step + 1, loss, held_out)
        for step, (loss, held_out) in enumerate(zip(record.losses, record.held_out, strict=True))
    ]
    return True


def _shard(folder: Path, step: int, rank: int) -> Path:
    return folder / f"state-{step}-{rank}.safetensors"


def _local(value: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local
