"""Heal a checkpoint: train it for a while to agree with the model that it was made from, and write the best state.

    student, teacher -> trainable decoder -> (layer by layer, if asked) -> end to end -> fold -> new folder

Quantised matrices are trained through their own grids, so the folder that comes out has the same bits a weight as the
one that went in; float ones stay float, or go to `bits` on the way (training quantised from the start is better than
healing what rounding left: the float weights below the grid are then the original ones). States for going on lie in
`.NAME.heal` beside the output until it is written.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import safetensors
import torch

from edgekit.checkpoint import Checkpoint, Entry, refuse_overlap, write_block, write_frame
from edgekit.errors import UserError
from edgekit.folder import explain_write_errors, new_folder, refuse_existing
from edgekit.heal import state
from edgekit.heal.data import Split, load
from edgekit.heal.decoder import HEAD, TABLE, Decoder, frozen, refuse_different_vocabulary
from edgekit.heal.distributed import Sharding, group_of_torchrun
from edgekit.heal.fake_quant import Levels, Offset, Scales
from edgekit.heal.layerwise import heal_layers
from edgekit.heal.losses import Kind, Loss
from edgekit.heal.matrix import Adapter
from edgekit.heal.multipliers import Placement, multipliers_for
from edgekit.heal.optimizers import Optimization, Optimizer, Schedule
from edgekit.heal.trainer import Progress, Trainer, Training
from edgekit.manifest import Manifest, StepRecord, now, record_files, versions

Parts = Literal["all", "multipliers", "grids", "adapters"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Options:
    """All options of a healing run.

    train       all: every matrix and norm; multipliers: multipliers and norms, codes stay; grids: scales, offsets and
                norms; adapters: low-rank changes of `adapter_rank`, folded at the end
    bits        of float matrices in the layers: 0 leaves them float; `embedding_bits` the same for table and head;
                `block`, `offset` and `scales` are those of both
    embedding   whether the values of table and head are trained too
    layer_steps steps for each layer alone, before all are trained together (0: none), at the rate `layer_rate`
    """

    steps: int = 200
    batch: int = 32
    micro_batch: int = 8
    length: int = 1024
    held_out: int = 32
    measure_every: int = 25
    patience: int = 0
    seed: int = 0
    optimizer: Optimizer = "adamw"
    learning_rate: float = 8e-4
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup: int = 20
    clip: float = 1.0
    loss: Kind = "kl"
    temperature: float = 1.0
    top: int = 64
    hidden_weight: float = 0.0
    train: Parts = "all"
    embedding: bool = False
    multipliers: Placement = "none"
    adapter_rank: int = 16
    bits: int = 0
    block: int = 32
    offset: Offset = "zero"
    scales: Scales = "float16"
    embedding_bits: int = 0
    layer_steps: int = 0
    layer_rate: float = 3e-3
    precision: Precision = "auto"
    recompute: bool = False
    sharding: Sharding = "ddp"

    def __post_init__(self) -> None:
        if self.train not in get_args(Parts):
            raise UserError(f"train must be one of {', '.join(get_args(Parts))}: got {self.train!r}")
        if self.precision not in get_args(Precision):
            raise UserError(f"precision must be one of {', '.join(get_args(Precision))}: got {self.precision!r}")
        if self.multipliers not in get_args(Placement):
            raise UserError(f"multipliers must be one of {', '.join(get_args(Placement))}: got {self.multipliers!r}")
        if self.train == "multipliers" and self.multipliers == "none":
            raise UserError("to train multipliers alone there must be some: pass --multipliers scalar, minimal or full")
        if self.adapter_rank < 1 or self.layer_steps < 0:
            raise UserError(
                f"adapter_rank must be at least 1 and layer_steps 0 or more: got {self.adapter_rank} and"
                f" {self.layer_steps}"
            )
        if not 0 < self.layer_rate < math.inf:
            raise UserError(f"layer_rate must be above 0 and finite: got {self.layer_rate}")
        for bits in (self.bits, self.embedding_bits):
            if bits:
                Levels(bits, self.block, self.offset, self.scales)
        self.training()

    def training(self) -> Training:
        """The part that the trainer needs; building it checks its values."""
        optimization = Optimization(
            self.optimizer, self.learning_rate, self.weight_decay, self.schedule, self.warmup, self.clip
        )
        loss = Loss(self.loss, self.temperature, self.top, self.hidden_weight)
        return Training(
            self.steps, self.batch, self.micro_batch, optimization, loss, self.measure_every, self.patience, self.seed
        )

    def levels(self, path: str) -> Levels | None:
        """The grid for a float matrix, or None."""
        bits = self.embedding_bits if path in (TABLE, HEAD) else self.bits
        return Levels(bits, self.block, self.offset, self.scales) if bits else None


@dataclass(frozen=True)
class Result:
    """What came of it: held-out loss before and after, steps taken, seconds, and each step's loss and held-out loss."""

    before: float
    after: float
    steps: int
    seconds: float
    history: tuple[tuple[int, float, float | None], ...] = field(default=())


def heal(
    student: Checkpoint,
    teacher: Checkpoint | None,
    output: Path,
    files: Sequence[Path],
    options: Options,
    *,
    resume: bool = False,
    force: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Train `student` on `files` and write its best state to the new folder `output`.

    `resume` goes on from the state of an interrupted run of the same options. Under torchrun all processes call this.
    Raises UserError: options or data that cannot be, an output that exists, a state of another run; ModelError: another
    vocabulary, a loss that is not finite (the saved state stays for --resume); BudgetError: the disk is full.
    """
    output = Path(os.path.abspath(output))
    with explain_write_errors(output), group_of_torchrun(options.sharding) as (group, device):
        refuse_overlap(student, output)
        refuse_existing(output, force=force)
        if teacher is not None:
            refuse_different_vocabulary(student, teacher)
        work = output.with_name(f".{output.name}.heal")
        if work.exists() and not resume and group.rank == 0:
            shutil.rmtree(work)
        on_stage("reading data")
        data = load(files, student, length=options.length, held_out=options.held_out, seed=options.seed)
        on_stage("loading models")
        dtype = dtype_for(options.precision, device)
        model = trainable(student, options, device).computes_in(dtype)
        original = None if teacher is None else frozen(teacher, device=device, dtype=dtype)
        identity = _identity(student, teacher, data, options, group.world)
        resumable = resume and (work / state.NAME).exists()
        if options.layer_steps and not resumable:
            if original is None:
                raise UserError("healing layer by layer needs a teacher: name one, or set layer_steps to 0")
            on_stage("healing layer by layer")
            heal_layers(model, original, data.train, steps=options.layer_steps, rate=options.layer_rate)
        trainer = Trainer(
            model, original, data, options.training(), device=device, group=group, compiled=device.type == "cuda"
        )
        if resume:
            state.restore(trainer, work, identity)
        before = trainer.held_out_loss()
        if group.rank == 0:
            work.mkdir(parents=True, exist_ok=True)
        group.barrier()
        on_stage("training")
        began = time.perf_counter()
        trainer.run(on_step=on_step, save=lambda now: state.save(now, work, identity))
        seconds = time.perf_counter() - began
        group.gather(trainer.task)
        result = Result(before, trainer.best, trainer.step, seconds, tuple(trainer.history))
        if group.rank == 0:
            with new_folder(output, force=force) as folder:
                write(model, student, folder, options, result)
            shutil.rmtree(work, ignore_errors=True)
        group.barrier()
    return result


def trainable(student: Checkpoint, options: Options, device: torch.device) -> Decoder:
    """The student with what is to be trained on top, and nothing else needing gradients."""
    fixed = options.train == "multipliers"
    model = Decoder(student, levels=options.levels, fixed=fixed, device=device)
    model.recompute = options.recompute
    generator = torch.Generator().manual_seed(options.seed)
    for path, (role, matrix) in model.matrices().items():
        found = multipliers_for(role, matrix.shape, options.multipliers, fixed_codes=fixed)
        matrix.multipliers = None if found is None else found.to(device)
        if options.train == "adapters" and path not in (TABLE, HEAD):
            matrix.adapter = Adapter(matrix.shape, options.adapter_rank, generator).to(device)
    for name, parameter in model.named_parameters():
        table = name.startswith(("embedding.", "lm_head."))
        values = name.endswith(".values")
        if values:
            parameter.requires_grad_(options.train == "all" and (options.embedding or not table))
        elif ".quantiser." in name:
            parameter.requires_grad_(options.train in ("all", "grids"))
    return model


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has it, unless told otherwise."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def write(model: Decoder, student: Checkpoint, folder: Path, options: Options, result: Result) -> None:
    """Write the healed model as a checkpoint folder, block by block."""
    shards: dict[str, list[str]] = {}
    structure: dict[str, Entry] = {}
    before = after = changed = 0
    for index, name in enumerate(student.blocks):
        source = student.read_block(name)
        block = model.to_block(source)
        shard = f"model-{index + 1:05}-of-{len(student.blocks):05}.safetensors"
        structure |= write_block(folder / shard, block)
        with safetensors.safe_open(folder / shard, framework="np") as file:
            shards[shard] = sorted(file.keys())
        before, after = before + source.size_bytes, after + block.size_bytes
        changed += len(block.matrices)
    names = write_frame(folder, student, shards=shards, structure=structure)
    facts = {"held_out_before": result.before, "held_out_after": result.after, "steps_taken": float(result.steps)}
    record = StepRecord(
        "heal.distill", asdict(options), changed, before, after, facts, seconds=result.seconds
    )  # fmt: skip
    earlier = student.manifest
    Manifest(
        kind="checkpoint",
        source=student.source,
        files=record_files(folder, set(names)),
        recipe=earlier.recipe if earlier else "",
        seed=options.seed,
        steps=(*(earlier.steps if earlier else ()), record),
        versions=versions("numpy", "safetensors", "torch"),
        created=now(),
    ).save(folder)


def _identity(
    student: Checkpoint, teacher: Checkpoint | None, data: Split, options: Options, processes: int
) -> state.Identity:
    text = hashlib.sha256()
    for part in (data.train, data.held_out):
        text.update(part.ids.tobytes() + part.scored.tobytes())
    chosen = hashlib.sha256(repr(options).encode()).hexdigest()
    return state.Identity(digest_of(student), digest_of(teacher), text.hexdigest(), chosen, processes)


def digest_of(checkpoint: Checkpoint | None) -> str:
    """A digest of a model's weights: its source's, joined with its files' where edgekit wrote it."""
    if checkpoint is None:
        return "none"
    if checkpoint.manifest is None:
        return checkpoint.source.digest
    files = sorted((name, record.sha256) for name, record in checkpoint.manifest.files.items())
    return hashlib.sha256(repr((checkpoint.source.digest, files)).encode()).hexdigest()


def recovered(before: float, after: float) -> float:
    """The share of the held-out loss that healing took away, in percent."""
    return 100 * (1 - after / before) if before and math.isfinite(before) else 0.0
