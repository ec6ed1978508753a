"""The long healing runs, on a GPU: `python benchmarks/heal_runs.py --source MODEL --data FOLDER --out FOLDER RUN ...`

Each RUN trains one state of SmolLM2-135M-Instruct from its source weights (or from an earlier run's) against the source
as teacher, on the healing texts and chats alone, and writes a line of JSON a state to OUT/results.jsonl. Products
(`65MB` ...) become checkpoints in STORE that `edgekit export` takes. `--prepare FOLDER` makes the data folder from the
evaluation data first. Further RUNs: `layers` searches the order in which layers are left out, `share` compares shares
of replaced tokens (`heal_gpu`) and keeps the best, `optimizers` compares optimisers, `NAME-before` only measures.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from heal_gpu import GraphTrainer, samples
from heal_models import dense, plain, regridded
from heal_plan import ORDER, RUNS, SHORT, Run
from heal_sets import FILES, WINDOW, evaluate, perplexity, prepare

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.folder import new_folder
from edgekit.heal import heal
from edgekit.heal.data import Corpus, split
from edgekit.heal.decoder import Decoder, frozen
from edgekit.heal.multipliers import Placement, multipliers_for
from edgekit.heal.optimizers import Optimization, Optimizer
from edgekit.heal.trainer import Progress, Training
from edgekit.manifest import now
from edgekit.merge.drop import without

SHARES = (0.0, 0.1, 0.25)
RATES = (1e-4, 3e-4, 8e-4, 2e-3, 5e-3)
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon", "mano", "mano-v2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", type=Path, help="where states are kept for runs that start from them")
    parser.add_argument("--prepare", type=Path, help="the folder of evaluation data to make --data from")
    parser.add_argument("--seconds", type=float, help="instead of each run's own time")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="of all runs; `optimizers`: this one alone")
    parser.add_argument("--rate", type=float, help="`optimizers`: this learning rate alone")
    parser.add_argument("--share", type=float, help="of replaced tokens, instead of what `share` found")
    parser.add_argument("--windows", type=int, default=10**9, help="use only so many windows of each healing file")
    options = parser.parse_args()
    source = open_checkpoint(options.source)
    if options.prepare:
        prepare(source, options.prepare, options.data)
    if not options.runs:
        return
    bench = Bench(source, options)
    whole = {"layers": bench.search_layers, "share": bench.compare_shares, "optimizers": bench.compare_optimizers}
    for name in options.runs:
        if name in whole:
            whole[name]()
            continue
        run = RUNS[name.removesuffix("-before")]
        bench.train(replace(run, seconds=options.seconds or run.seconds), only_before=name.endswith("-before"))


class Bench:
    """What all runs share: teacher, data, evaluation sets, and the files they write."""

    def __init__(self, source: Checkpoint, options: argparse.Namespace) -> None:
        self.source, self.out, self.store = dense(source), options.out, options.store
        self.optimizer: Optimizer = options.optimizer or "adamw"
        self.optimizers = (self.optimizer,) if options.optimizer else OPTIMIZERS
        self.rates = (options.rate,) if options.rate else RATES
        self.store.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.teacher = frozen(source, device=self.device, dtype=self.dtype)
        parts = [np.load(options.data / f"{name}.npz")["ids"][: options.windows].astype(np.int32) for name in FILES]
        self.textbooks = len(parts[0])
        ids = np.concatenate(parts)
        self.data = split(Corpus(ids, np.ones(ids.shape, np.bool_)), held_out=32, seed=0)
        self.all = ids
        self.sets = dict(np.load(options.data / "eval.npz"))
        self.results = options.out / "results.jsonl"
        chosen = self.store / "share.json"
        self.share = options.share if options.share is not None else 0.0
        if options.share is None and chosen.exists():
            self.share = json.loads(chosen.read_text())
        self.others: Any = None
        self.note(name="machine", gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
                  torch=torch.__version__, tokens=int(ids.size), share=self.share, date=now())  # fmt: skip
        known = self.store / "source.json"
        if not known.exists():
            known.write_text(json.dumps(evaluate(self.teacher, self.sets, self.device)))
        self.note(name="source", **json.loads(known.read_text()))

    def note(self, **row: Any) -> None:
        print(json.dumps(row), flush=True)
        with self.results.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def student(self, run: Run) -> Decoder:
        """The model that `run` begins with, on its grids."""
        checkpoint = open_checkpoint(self.store / run.start) if run.start else self.source
        before = RUNS[run.start].drop if run.start else ()
        left = [index for index in range(self.source.decoder.layers) if index not in before]
        self.shape = without(
            regridded(checkpoint, run.grid), [left.index(index) for index in run.drop if index in left]
        )
        model = Decoder(self.shape, levels=run.grid, device=self.device).computes_in(self.dtype)
        model.embedding.values.requires_grad_(run.table_trained)
        return model

    def training(self, run: Run, steps: int, optimizer: Optimizer, every: int = 200) -> Training:
        optimization = Optimization(optimizer, run.rate, warmup=min(50, max(5, steps // 20)))
        return Training(
            steps=steps, batch=run.batch, micro_batch=run.batch, optimization=optimization, measure_every=every,
            piece=1 << 20,
        )  # fmt: skip

    def trainer(self, student: Decoder, training: Training) -> GraphTrainer:
        gc.collect()  # an earlier trainer's graph holds its memory
        trainer = GraphTrainer(
            student, self.teacher, self.data, training, device=self.device, compiled=self.device.type == "cuda"
        )
        if self.share:
            if self.others is None:
                self.others = self.drawn()
            trainer.others, trainer.share = self.others, self.share
        return trainer

    def drawn(self) -> Any:
        """What may stand in the place of each token of the training windows; kept in the store."""
        path = self.store / "others.npy"
        if not path.exists():
            began = time.perf_counter()
            np.save(path, samples(self.teacher, self.data.train, self.device))
            print(f"samples of the source for each token in {time.perf_counter() - began:.0f} s", flush=True)
        found: Any = np.load(path)
        return found

    def train(self, run: Run, *, only_before: bool = False) -> None:
        """Time a few steps, then train for as many as the run's seconds hold.

        "Before" is the state of the source's own weights, whatever the run starts from.
        """
        before = self.student(replace(run, start=""))
        self.note(name=run.name + " before", start="", layers=len(before.layers), **self.measure(before))
        if only_before:
            return
        student = self.student(run)
        pace = self.pace(student, run)
        steps = max(20, int(run.seconds * pace / (run.batch * WINDOW)))
        print(f"{run.name}: {pace:.0f} tokens/s, {steps} steps", flush=True)
        trainer = self.trainer(student, self.training(run, steps, self.optimizer, every=max(50, steps // 6)))
        began = time.perf_counter()
        trainer.run(on_step=talk(every=100))
        seconds = time.perf_counter() - began
        self.write(student, run, trainer, seconds)
        curve = [(s, round(loss, 4), v) for s, loss, v in trainer.history if v is not None or s % 20 == 0]
        self.note(
            name=run.name, layers=len(student.layers), start=run.start, optimizer=self.optimizer, rate=run.rate,
            grids={part: f"{levels.bits}/{levels.block}" for part, levels in run.grids.items()}, share=self.share,
            data="files", steps=steps, tokens=steps * run.batch * WINDOW, seconds=seconds,
            tokens_per_s=steps * run.batch * WINDOW / seconds, held_out=trainer.best, curve=curve,
            **self.measure(student),
        )  # fmt: skip

    def write(self, student: Decoder, run: Run, trainer: GraphTrainer, seconds: float) -> None:
        """The state as a checkpoint."""
        options = heal.Options(
            steps=trainer.step, batch=run.batch, optimizer=self.optimizer, learning_rate=run.rate,
            embedding=run.table_trained,
        )  # fmt: skip
        result = heal.Result(float("nan"), trainer.best, trainer.step, seconds)
        with new_folder(self.store / run.name, force=True) as folder:
            heal.write(student, self.shape, folder, options, result)

    def pace(self, student: Decoder, run: Run) -> float:
        """Tokens a second, the first steps left out; the student is as before."""
        state = {name: value.detach().clone() for name, value in student.state_dict().items()}
        seen: list[float] = []
        trainer = self.trainer(student, self.training(run, 8, self.optimizer, every=1000))
        trainer.run(on_step=lambda progress: seen.append(time.perf_counter()))
        student.load_state_dict(state)
        return float(run.batch * WINDOW * 5 / (seen[-2] - seen[-7]))

    def measure(self, student: Decoder) -> dict[str, Any]:
        return evaluate(student, self.sets, self.device)

    # --- comparisons --------------------------------------------------------------------------------------------------

    def compare_shares(self) -> None:
        """Shares of replaced tokens, on a little text seen four times; measured on textbooks, of which none is seen."""
        whole, others, share, run = self.data, self.others, self.share, replace(SHORT, batch=32)
        rows = np.random.default_rng(0).permutation(np.arange(self.textbooks, len(self.all)))[:1024]
        apart = np.random.default_rng(0).permutation(self.textbooks)[:64]
        corpora = [Corpus(self.all[part], np.ones(self.all[part].shape, np.bool_)) for part in (rows, apart)]
        self.data = replace(whole, train=corpora[0], held_out=corpora[1])
        self.others = samples(self.teacher, self.data.train, self.device)
        found = {}
        for self.share in SHARES:
            found[self.share] = self.short(run, 4 * len(rows) // run.batch, "adamw", "share", share=self.share)
        best = min(found, key=lambda share: found[share])
        (self.store / "share.json").write_text(json.dumps(best))
        self.data, self.others, self.share = whole, others, best if share == 0.0 else share

    def compare_optimizers(self) -> None:
        """Equal tokens for each optimiser and rate, at 3 bits; then each at its best rate with multipliers."""
        share, self.share = self.share, 0.0
        for optimizer in self.optimizers:
            found = {}
            for rate in self.rates:
                found[rate] = self.short(replace(SHORT, rate=rate), 100, optimizer, "optimizers")
            best = min(found, key=lambda rate: found[rate])
            for placement in ("minimal", "full"):
                self.short(replace(SHORT, rate=best), 100, optimizer, "optimizers", multipliers=placement)
        self.share = share

    def short(
        self, run: Run, steps: int, optimizer: str, name: str, *, multipliers: str = "none", **facts: Any
    ) -> float:
        """The held-out loss after a short training, the last state's as the best one's."""
        student = self.student(run)
        add_multipliers(student, cast(Placement, multipliers))
        trainer = self.trainer(student, self.training(run, steps, cast(Optimizer, optimizer), every=1000))
        began = time.perf_counter()
        try:
            trainer.run()
            found = perplexity(plain(student, torch.float32), self.sets["wikitext2"], self.device)
        except Exception as problem:
            print(f"{optimizer} {run.rate}: {problem}", flush=True)
            found = float("inf")
        self.note(
            name=name, optimizer=optimizer, rate=run.rate, multipliers=multipliers, steps=steps,
            tokens=steps * run.batch * WINDOW, seconds=time.perf_counter() - began, held_out=trainer.best,
            wikitext2=found, **facts,
        )  # fmt: skip
        return trainer.best

    def search_layers(self) -> None:
        """Leave out, one after another, the layer whose absence raises the held-out KL least."""
        drop: tuple[int, ...] = ()
        while len(drop) < len(ORDER):
            left = [index for index in range(self.source.decoder.layers) if index not in drop]
            drop = (*drop, min(left, key=lambda index: self.kl_without((*drop, index))))
        self.note(name="layers", order=drop)

    @torch.no_grad()
    def kl_without(self, drop: tuple[int, ...]) -> float:
        model, every = self.teacher, self.teacher.layers
        ids = torch.from_numpy(self.data.held_out.ids[:8].astype(np.int64)).to(self.device)
        whole = model.logits(ids).log_softmax(-1)
        model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(every) if index not in drop)
        without = model.logits(ids).log_softmax(-1)
        model.layers = every
        return float((whole.exp() * (whole - without)).sum(-1).mean())


def talk(*, every: int) -> Callable[[Progress], None]:
    def on_step(p: Progress) -> None:
        if p.step % every == 0 or p.held_out is not None:
            held = "" if p.held_out is None else f" held out {p.held_out:.4f}"
            print(f"  {p.step}/{p.steps} loss {p.loss:.4f}{held} {p.tokens_per_s:.0f} tok/s", flush=True)

    return on_step


def add_multipliers(student: Decoder, placement: Placement) -> None:
    device = student.norm.device
    for role, matrix in student.matrices().values():
        found = multipliers_for(role, matrix.shape, placement)
        matrix.multipliers = None if found is None else found.to(device)


if __name__ == "__main__":
    main()
