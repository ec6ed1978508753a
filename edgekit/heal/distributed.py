"""One process or many: what differs between them, in one object.

`torchrun --nproc-per-node N` starts N processes that each know their rank. Every process takes its part of each batch;
gradients are averaged. DDP keeps a whole copy of the student in each process, FSDP2 (`fully_shard`) a part of every
matrix, which are gathered layer by layer as the pass goes on. Both give the losses of one process to rounding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgekit.errors import DeviceError, UserError

Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Group:
    """This process's place among `world`; `sharding` says how they share the student."""

    rank: int = 0
    world: int = 1
    sharding: Sharding = "ddp"

    def wrap(self, task: Any) -> nn.Module:
        """The module to call: `task` itself, or what keeps its copies or shards in step."""
        if self.world == 1:
            return task
        if self.sharding == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            device = next(task.parameters()).device
            return DistributedDataParallel(task, device_ids=[device] if device.type == "cuda" else None)
        from torch.distributed.fsdp import fully_shard

        for layer in task.student.layers:
            fully_shard(layer)
        return fully_shard(task)

    @contextlib.contextmanager
    def no_sync(self, task: Any) -> Iterator[None]:
        """Gather gradients without exchanging them: all but the last piece of a step."""
        if self.world == 1:
            yield
        elif self.sharding == "ddp":
            with task.no_sync():
                yield
        else:
            task.set_requires_gradient_sync(False)
            yield
            task.set_requires_gradient_sync(True)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()

    def gather(self, task: Any) -> None:
        """Make every parameter whole in every process, to be read."""
        if self.world > 1 and self.sharding == "fsdp":
            for layer in task.student.layers:
                layer.unshard()
            task.unshard()


ALONE = Group()


@contextlib.contextmanager
def group_of_torchrun(sharding: Sharding) -> Iterator[tuple[Group, torch.device]]:
    """The group that torchrun's environment describes (one process without it) and this process's device.

    NCCL between GPUs, gloo between CPUs. Raises UserError: another sharding; DeviceError: the processes cannot meet.
    """
    if sharding not in ("ddp", "fsdp"):
        raise UserError(f"sharding must be ddp or fsdp: got {sharding!r}")
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield ALONE, device
        return
    try:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as problem:
        raise DeviceError(
            f"the {world} processes must reach each other: {problem}; start them with torchrun"
        ) from problem
    try:
        yield Group(rank, world, sharding), device
    finally:
        torch.distributed.destroy_process_group()
