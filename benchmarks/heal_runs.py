"""The long healing runs, on a GPU: `python benchmarks/heal_runs.py --source MODEL --data FOLDER --out FOLDER RUN ...`

Each RUN trains one state of SmolLM2-135M-Instruct from its source weights (or from an earlier run's) against the source
as teacher, writes a line of JSON a state to OUT/results.jsonl, and its codes to OUT. `--prepare` makes the data folder
(tokens of the healing files, windows of the texts, multiple-choice items) from the evaluation data, without a GPU.
Perplexity as everywhere: 24 windows of 1024 tokens, second halves; accuracy by length-normalised likelihood.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import ModelError
from edgekit.heal.data import Corpus, Encoder, pack, split
from edgekit.heal.decoder import HEAD, NORM, NORMS, TABLE, Decoder, frozen, rms_norm, rotate
from edgekit.heal.fake_quant import FakeQuant, Levels
from edgekit.heal.multipliers import Placement, multipliers_for
from edgekit.heal.optimizers import Optimization
from edgekit.heal.trainer import Progress, Trainer, Training

FILES = ("textbooks", "ebooks", "novels", "chat_train")
TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa")
BOOKS = ("moby-dick", "war-and-peace", "middlemarch", "the-count-of-monte-cristo")
WINDOW, WINDOWS = 1024, 24
DREAMS = 3072  # windows that the source writes at a time: 72 GB of keys and values
FIFTH = (12, 13, 14, 17, 25, 26)  # least change of direction (facts of the first probe)


@dataclass(frozen=True)
class Run:
    """A state to train: layers left out, grids of the layers and of the table, where it starts, and how long."""

    name: str
    drop: tuple[int, ...] = ()
    levels: Levels | None = None
    table: Levels | None = None
    start: str = ""
    table_trained: bool = False  # or only its scales
    more: int = 0  # layers to leave out beside, chosen as `Bench.drops` does
    keep: bool = True  # whether its codes go to OUT
    seconds: float = 240
    rate: float = 1e-3
    batch: int = 32


THREE, WIDE = Levels(3, 32, "zero"), Levels(3, 64, "zero")
TABLE4, TABLE3 = Levels(4, 64, "zero"), Levels(3, 64, "zero")
RUNS = {
    run.name: run
    for run in (
        Run("int3", levels=THREE, rate=8e-4),
        Run("int2", levels=Levels(2, 32, "minimum"), rate=1.5e-3, keep=False, seconds=140),
        Run("fifth", drop=FIFTH, table_trained=True, keep=False),
        Run("fifth-int3", drop=FIFTH, levels=THREE, keep=False, seconds=140),
        Run("60MB", levels=WIDE, table=TABLE4, table_trained=True, seconds=80, rate=8e-4),
        Run(
            "53MB", drop=FIFTH, levels=WIDE, table=TABLE4, start="fifth-int3", table_trained=True, seconds=45, rate=6e-4
        ),
        Run("45MB", drop=FIFTH, more=2, levels=WIDE, table=TABLE3, start="fifth-int3", table_trained=True, seconds=50),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", type=Path, help="where states are kept for runs that start from them")
    parser.add_argument("--prepare", type=Path, help="the folder of evaluation data to make --data from")
    parser.add_argument("--seconds", type=float, help="instead of each run's own time")
    parser.add_argument("--dreams", type=int, default=0, help="add so many windows that the source itself writes")
    parser.add_argument("--windows", type=int, default=10**9, help="use only so many windows of each healing file")
    options = parser.parse_args()
    source = open_checkpoint(options.source)
    if options.prepare:
        prepare(source, options.prepare, options.data)
        return
    bench = Bench(source, options)
    for name in options.runs:
        if name in ("optimizers", "graph"):
            bench.compare_optimizers() if name == "optimizers" else bench.try_graph()
            continue
        run = RUNS[name]
        bench.train(replace(run, seconds=options.seconds or run.seconds))


class GraphTrainer(Trainer):
    """A trainer that replays forward and backward pass as one CUDA graph: 210 small roundings a step otherwise keep the
    CPU busier than the GPU. Every token is scored; the batch is taken at once."""

    graph: torch.cuda.CUDAGraph | None = None

    def _train(self, rows: Any, rate: float) -> float:
        ids = torch.from_numpy(self.data.train.ids[rows].astype(np.int64))
        if self.graph is None:
            self.capture(ids)
        self.ids.copy_(ids)
        self.graph.replay()
        mean, norm = float(self.loss), self.optimizers.clip(self.training.optimization.clip)
        if not math.isfinite(mean + norm):
            self._restore_best()
            raise ModelError(f"the loss must be finite: step {self.step + 1} gave {mean:.4g} and a norm of {norm:.4g}")
        self.optimizers.step(rate)
        return mean

    def capture(self, ids: torch.Tensor) -> None:
        self.ids = ids.to(self.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizers.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.forward_backward()

    def forward_backward(self) -> torch.Tensor:
        self.optimizers.zero_grad()
        loss: torch.Tensor = self.task(self.ids, None) / (self.ids.shape[0] * (WINDOW - 1))
        loss.backward()
        return loss.detach()


class Bench:
    """What all runs share: teacher, data, evaluation sets, and the files they write."""

    def __init__(self, source: Checkpoint, options: argparse.Namespace) -> None:
        self.source, self.out, self.store = source, options.out, options.store
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.teacher = frozen(source, device=self.device, dtype=self.dtype)
        parts = [load_tokens(options.data / f"{name}.npz", options.windows) for name in FILES]
        if options.dreams:
            parts.append(self.dreams(options.dreams, np.concatenate(parts)))
        ids = np.concatenate(parts)
        self.data = split(Corpus(ids, np.ones(ids.shape, np.bool_)), held_out=32, seed=0)
        self.sets = dict(np.load(options.data / "eval.npz"))
        self.results = options.out / "results.jsonl"
        self.note(name="machine", gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
                  torch=torch.__version__, tokens=int(ids.size))  # fmt: skip
        self.note(name="source", **self.evaluate(self.teacher))

    def dreams(self, count: int, texts: Any) -> Any:
        """Windows that the source writes, half of them from an end-of-text token on, half from 16 tokens of a file on;
        kept in the store."""
        path = self.store / "dreams.npy"
        if not path.exists():
            began = time.perf_counter()
            rows = np.random.default_rng(1).permutation(len(texts))[: count // 2]
            starts = [np.zeros((count - len(rows), 1), np.int64), texts[rows, 200:216].astype(np.int64)]
            parts = [start[at : at + DREAMS] for start in starts for at in range(0, len(start), DREAMS)]
            found = [dream(self.teacher, torch.from_numpy(part).to(self.device), WINDOW, seed=i)
                     for i, part in enumerate(parts)]  # fmt: skip
            self.store.mkdir(parents=True, exist_ok=True)
            np.save(path, np.concatenate(found))
            print(f"{count} windows written in {time.perf_counter() - began:.0f} s", flush=True)
        written: Any = np.load(path)
        return written

    def note(self, **row: Any) -> None:
        print(json.dumps(row), flush=True)
        with self.results.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def student(self, run: Run) -> Decoder:
        """The model that `run` begins with, on its grids."""
        checkpoint = stored(self.source, self.store / f"{run.start}.safetensors") if run.start else self.source
        before = self.drops(RUNS[run.start]) if run.start in RUNS else ()
        left = [index for index in range(self.source.decoder.layers) if index not in before]
        checkpoint = without_layers(checkpoint, [left.index(index) for index in self.drops(run) if index in left])

        def levels(path: str) -> Levels | None:
            return run.table if path == TABLE else run.levels

        model = Decoder(checkpoint, levels=levels, device=self.device).computes_in(self.dtype)
        model.embedding.values.requires_grad_(run.table_trained)
        return model

    def drops(self, run: Run) -> tuple[int, ...]:
        """The layers that `run` leaves out: a fifth by direction or by a greedy search, whichever has the lower KL on
        held-out text, and `more` by going on with the search. Found once, kept in the store."""
        if not run.drop:
            return ()
        path = self.store / "layers.json"
        if not path.exists():
            greedy = self.search((), len(FIFTH))
            first = min((FIFTH, greedy), key=self.kl_without)
            found = {"first": first, "all": self.search(first, len(first) + 3)}
            self.note(name="layers", direction=FIFTH, direction_kl=self.kl_without(FIFTH), greedy=greedy,
                      greedy_kl=self.kl_without(greedy), **found)  # fmt: skip
            self.store.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        found = json.loads(path.read_text())
        return tuple(found["all"][: len(run.drop) + run.more])

    def search(self, drop: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Leave out, one after another, the layer whose absence raises the held-out KL least."""
        while len(drop) < count:
            left = [index for index in range(self.source.decoder.layers) if index not in drop]
            drop = (*drop, min(left, key=lambda index: self.kl_without((*drop, index))))
        return drop

    @torch.no_grad()
    def kl_without(self, drop: tuple[int, ...]) -> float:
        model, every = self.teacher, self.teacher.layers
        ids = torch.from_numpy(self.data.held_out.ids[:8].astype(np.int64)).to(self.device)
        whole = model.logits(ids).log_softmax(-1)
        model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(every) if index not in drop)
        without = model.logits(ids).log_softmax(-1)
        model.layers = every
        return float((whole.exp() * (whole - without)).sum(-1).mean())

    def training(self, run: Run, steps: int, optimizer: Any = "adamw", every: int = 200) -> Training:
        optimization = Optimization(optimizer, run.rate, warmup=min(50, max(5, steps // 20)))
        return Training(
            steps=steps, batch=run.batch, micro_batch=run.batch, optimization=optimization, measure_every=every,
            piece=1 << 20,
        )  # fmt: skip

    def train(self, run: Run) -> None:
        """Time a few steps, then train for as many as the run's seconds hold."""
        student = self.student(run)
        before = self.evaluate(student, choices=False)
        self.note(name=run.name + " before", layers=len(student.layers), **before)
        pace = self.pace(student, run)
        steps = max(20, int(run.seconds * pace / (run.batch * WINDOW)))
        print(f"{run.name}: {pace:.0f} tokens/s, {steps} steps", flush=True)
        trainer = self.trainer(student, self.training(run, steps, every=max(50, steps // 6)))
        began = time.perf_counter()
        trainer.run(on_step=talk(every=50))
        seconds = time.perf_counter() - began
        self.note(
            name=run.name, layers=len(student.layers), steps=steps, tokens=steps * run.batch * WINDOW, rate=run.rate,
            seconds=seconds, tokens_per_s=steps * run.batch * WINDOW / seconds, held_out=trainer.best,
            curve=[(s, round(loss, 4), v) for s, loss, v in trainer.history if v is not None or s % 20 == 0],
            **self.evaluate(student),
        )  # fmt: skip
        if self.store:
            self.store.mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(latent_tensors(student), self.store / f"{run.name}.safetensors")
        if run.keep:
            save_codes(student, self.out, run.name, self.drops(run))

    def trainer(self, student: Decoder, training: Training, *, graph: bool | None = None) -> Trainer:
        graph = (self.store / "graph.json").exists() if graph is None else graph
        kind = GraphTrainer if graph else Trainer
        gc.collect()  # an earlier trainer's graph holds its memory
        return kind(student, self.teacher, self.data, training, device=self.device, compiled=self.device.type == "cuda")

    def try_graph(self) -> None:
        """The same steps with and without a CUDA graph; later runs use one if it is faster and the losses agree."""
        run, steps, pace, losses = RUNS["int3"], 16, [], []
        for graph in (False, True):
            trainer, seen = self.trainer(self.student(run), self.training(run, steps, every=1000), graph=graph), []

            def clock(progress: Progress, seen: list[float] = seen) -> None:
                seen.append(time.perf_counter())

            trainer.run(on_step=clock)
            pace.append(run.batch * WINDOW * 8 / (seen[-2] - seen[-10]))
            losses.append([loss for _, loss, _ in trainer.history])
        apart = float(np.max(np.abs(np.subtract(*losses)) / losses[0]))
        self.note(name="graph", tokens_per_s=pace, apart=apart)
        if apart < 0.02 and pace[1] > pace[0]:
            self.store.mkdir(parents=True, exist_ok=True)
            (self.store / "graph.json").write_text(json.dumps(pace))

    def pace(self, student: Decoder, run: Run) -> float:
        """Tokens a second, the first step left out; the student is as before."""
        state = {name: value.detach().clone() for name, value in student.state_dict().items()}
        seen: list[float] = []
        trainer = self.trainer(student, self.training(run, 8, every=1000))

        def clock(progress: Progress) -> None:
            seen.append(time.perf_counter())

        trainer.run(on_step=clock)
        student.load_state_dict(state)
        return float(run.batch * WINDOW * 5 / (seen[-2] - seen[-7]))

    def compare_optimizers(self) -> None:
        """Equal steps and tokens for each optimiser and learning rate, at 3 bits; then multipliers beside the best
        of each."""
        steps, batch = 60, 16
        for state, run in (("int3", RUNS["int3"]),):
            student = self.student(run)
            initial = {name: value.detach().clone() for name, value in student.state_dict().items()}
            for optimizer in ("adamw", "muon", "mano", "mano-v2"):
                found = {}
                for rate in (3e-4, 1e-3, 3e-3):
                    student.load_state_dict(initial)
                    found[rate] = self.short(student, replace(run, rate=rate, batch=batch), steps, optimizer, state)
                best = min(found, key=lambda rate: found[rate])
                for placement in ("minimal", "full"):
                    student.load_state_dict(initial)
                    add_multipliers(student, placement)
                    tuned = replace(run, rate=best, batch=batch)
                    self.short(student, tuned, steps, optimizer, state, placement)
                    for _, matrix in student.matrices().values():
                        matrix.multipliers = None

    def short(
        self, student: Decoder, run: Run, steps: int, optimizer: str, state: str, multipliers: str = "none"
    ) -> float:
        trainer = self.trainer(student, self.training(run, steps, optimizer, every=1000))
        began = time.perf_counter()
        try:
            trainer.run()
            found = self.perplexity(student, self.sets["wikitext2"])
        except Exception as problem:
            print(f"{state} {optimizer} {run.rate}: {problem}", flush=True)
            found = float("inf")
        self.note(
            name="optimizers", state=state, optimizer=optimizer, rate=run.rate, multipliers=multipliers, steps=steps,
            tokens=steps * run.batch * WINDOW, seconds=time.perf_counter() - began, held_out=trainer.best,
            wikitext2=found,
        )  # fmt: skip
        return trainer.best

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, model: Decoder, *, choices: bool = True) -> dict[str, Any]:
        """Perplexities and accuracies of the model as it would be written: rounded weights, products in float32."""
        found: dict[str, Any] = {"wikitext2": self.perplexity(model, self.sets["wikitext2"])}
        found["books"] = {name: self.perplexity(model, self.sets[name]) for name in BOOKS}
        if choices:
            found["accuracy"] = {task: self.accuracy(model, task) for task in TASKS}
        return found

    @torch.no_grad()
    def perplexity(self, model: Decoder, windows: Any) -> float:
        exact = plain(model, self.device, torch.float32)
        total, count = 0.0, 0
        for start in range(0, len(windows), 8):
            ids = torch.from_numpy(windows[start : start + 8].astype(np.int64)).to(self.device)
            logits = exact.logits(ids)[:, WINDOW // 2 : -1].double().log_softmax(-1)
            total -= float(logits.gather(-1, ids[:, WINDOW // 2 + 1 :, None]).sum())
            count += ids.shape[0] * (WINDOW - WINDOW // 2 - 1)
        return float(np.exp(total / count))

    @torch.no_grad()
    def accuracy(self, model: Decoder, task: str) -> float:
        """Percent of items whose right choice has the highest likelihood a byte."""
        exact = plain(model, self.device, self.dtype)
        ids, scored, size, item, answer = (
            self.sets[f"{task}.{part}"] for part in ("ids", "scored", "bytes", "item", "answer")
        )
        lengths = np.diff(self.sets[f"{task}.starts"])
        starts, order = self.sets[f"{task}.starts"], np.argsort(lengths)
        score = np.zeros(len(lengths))
        for at in range(0, len(order), 128):
            rows = order[at : at + 128]
            width = -(-int(lengths[rows].max()) // 32) * 32
            batch = np.zeros((len(rows), width), np.int64)
            flags = np.zeros((len(rows), width), np.bool_)
            for i, row in enumerate(rows):
                n = lengths[row]
                batch[i, :n] = ids[starts[row] : starts[row + 1]]
                flags[i, n - scored[row] : n] = True
            x = torch.from_numpy(batch).to(self.device)
            logp = exact.logits(x)[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
            score[rows] = (logp * torch.from_numpy(flags[:, 1:]).to(self.device)).sum(-1).cpu().numpy()
        score /= size
        right = [int(np.argmax(score[item == i]) == answer[i]) for i in range(len(answer))]
        return float(100 * np.mean(right))


@torch.no_grad()
def dream(model: Decoder, ids: torch.Tensor, length: int, *, seed: int) -> Any:
    """Sequences that the model goes on with from `ids` (N, T), sampled at temperature 1: (N, length) int32."""
    torch.manual_seed(seed)
    count, device, dtype, width = len(ids), ids.device, model.dtype, model.config.head_dim
    cos, sin = model.rope(length, device)
    layers = [({role: m.weight() for role, m in layer.matrices().items()}, dict(layer.gains)) for layer in model.layers]
    shape = (len(layers), 2, count, layers[0][0]["k"].shape[0] // width, length, width)
    cache = torch.empty(shape, device=device, dtype=dtype)
    table, written, new, at = model.embedding.weight(), ids, ids, 0
    while at < length:
        end = at + new.shape[1]
        state = F.embedding(new, table).float()
        for (w, gains), (past_k, past_v) in zip(layers, cache, strict=True):
            x = rms_norm(state, gains["before_attention"], model.config.norm_eps).to(dtype)
            q, k, v = (F.linear(x, w[role]).view(count, end - at, -1, width).transpose(1, 2) for role in "qkv")
            past_k[:, :, at:end] = rotate(k, cos[at:end], sin[at:end])
            past_v[:, :, at:end] = v
            q = rotate(q, cos[at:end], sin[at:end]).to(dtype)
            if end - at == 1:  # the queries of one key head as rows of one product: its keys are read once
                rows = q.view(count, past_k.shape[1], -1, width)
                mixed = F.scaled_dot_product_attention(rows, past_k[:, :, :end], past_v[:, :, :end]).view(q.shape)
            else:
                mixed = F.scaled_dot_product_attention(
                    q, past_k[:, :, :end], past_v[:, :, :end], is_causal=True, enable_gqa=True
                )
            state = state + F.linear(mixed.transpose(1, 2).reshape(count, end - at, -1), w["o"])
            x = rms_norm(state, gains["before_mlp"], model.config.norm_eps).to(dtype)
            state = state + F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])
        logits = (rms_norm(state[:, -1], model.norm, model.config.norm_eps).to(dtype) @ table.T).float()
        noise = torch.empty_like(logits).exponential_()  # the largest of p / Exp(1) is a sample of p
        new = (logits.softmax(-1) / noise).argmax(-1, keepdim=True)
        written, at = torch.cat([written, new], 1), end
    return written[:, :length].to(torch.int32).cpu().numpy()


def plain(model: Decoder, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A copy that computes uncompiled in `dtype` with the weights as they would be written."""
    copy = Decoder.__new__(Decoder)
    torch.nn.Module.__init__(copy)
    copy.config, copy.recompute, copy.dtype, copy._tables = model.config, False, dtype, None
    copy.embedding, copy.norm = _Constant(model.embedding, dtype), model.norm
    copy.lm_head = None if model.lm_head is None else _Constant(model.lm_head, dtype)
    copy.layers = torch.nn.ModuleList()
    from edgekit.heal.decoder import ROLES, Layer, layer_forward

    for layer in model.layers:
        twin = Layer.__new__(Layer)
        torch.nn.Module.__init__(twin)
        twin.config, twin.dtype, twin.compute = layer.config, dtype, layer_forward
        twin.biases, twin.gains = layer.biases, layer.gains
        for role in ROLES:
            setattr(twin, role, _Constant(getattr(layer, role), dtype))
        copy.layers.append(twin)
    return copy


class _Constant(torch.nn.Module):
    def __init__(self, matrix: Any, dtype: torch.dtype) -> None:
        super().__init__()
        compiled = getattr(matrix, "quantiser", None)
        if compiled is not None:
            from edgekit.heal.fake_quant import fake_quantise

            compute, compiled.compute = compiled.compute, fake_quantise
            self.W = matrix.weight().detach().to(dtype)
            compiled.compute = compute
        else:
            self.W = matrix.weight().detach().to(dtype)

    def weight(self) -> torch.Tensor:
        return self.W


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


# --- models in memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """A TensorReader of arrays."""

    tensors: dict[str, Any]

    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def files(self) -> set[Path]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Any:
        return self.tensors[name]


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with float matrices."""
    tensors = {}
    for matrices, vectors in checkpoint.blocks.values():
        tensors.update({f"{path}.weight": checkpoint.weight(path).dense() for path in matrices})
        tensors.update({name: checkpoint.vector(name) for name in vectors})
    return replace(checkpoint, tensors=Memory(tensors), structure={})


def without_layers(checkpoint: Checkpoint, drop: Sequence[int]) -> Checkpoint:
    """The model without some layers, those after them renumbered."""
    whole = dense(checkpoint)
    kept = [index for index in range(checkpoint.decoder.layers) if index not in drop]
    tensors = {}
    for name in whole.tensors.names():
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            if int(index) not in kept:
                continue
            tensors[f"model.layers.{kept.index(int(index))}.{rest}"] = whole.tensors.read(name)
        else:
            tensors[name] = whole.tensors.read(name)
    config = {**checkpoint.config, "num_hidden_layers": len(kept)}
    return replace(whole, tensors=Memory(tensors), config=config)


def stored(source: Checkpoint, path: Path) -> Checkpoint:
    tensors = safetensors.numpy.load_file(path)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    config = {**source.config, "num_hidden_layers": layers}
    return replace(source, tensors=Memory(tensors), structure={}, config=config)


def vectors_of(student: Decoder) -> dict[str, Any]:
    tensors = {NORM: student.norm.detach().float().cpu().numpy()}
    for index, layer in enumerate(student.layers):
        for key, gain in layer.gains.items():
            tensors[f"model.layers.{index}.{NORMS[key]}"] = gain.detach().float().cpu().numpy()
    return tensors


@torch.no_grad()
def latent_tensors(student: Decoder) -> dict[str, Any]:
    """The float weights under the grids."""
    tensors = {
        f"{path}.weight": np.ascontiguousarray(matrix.latent().float().cpu().numpy())
        for path, (_, matrix) in student.matrices().items()
        if path != HEAD
    }
    return tensors | vectors_of(student)


def save_codes(student: Decoder, out: Path, name: str, drop: tuple[int, ...]) -> None:
    """Codes packed bit by bit, scales and offsets, in files of at most 15 MB."""
    arrays: dict[str, Any] = dict(vectors_of(student))
    grids = {}
    for path, (_, matrix) in student.matrices().items():
        quantiser: FakeQuant | None = matrix.quantiser
        if quantiser is None:
            continue  # as in the source
        codes, scale, offset = quantiser.integers(matrix.latent())
        levels = quantiser.levels
        bits = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1, bitorder="little")[:, : levels.bits]
        arrays[f"{path}.codes"] = np.packbits(bits.reshape(-1), bitorder="little")
        arrays[f"{path}.scales"] = scale.cpu().numpy().astype(np.float16)
        kinds = {"zero": np.uint8, "minimum": np.float16}
        if levels.offset in kinds:
            arrays[f"{path}.offset"] = offset.cpu().numpy().astype(kinds[levels.offset])
        grids[path] = [levels.bits, levels.block, levels.offset, list(matrix.shape)]
    (out / f"{name}.json").write_text(json.dumps({"drop": drop, "grids": grids}))
    part: dict[str, Any] = {}
    count = 0
    for key in sorted(arrays, key=lambda key: (-arrays[key].nbytes, key)):
        if sum(a.nbytes for a in part.values()) + arrays[key].nbytes > 15e6 and part:
            safetensors.numpy.save_file(part, out / f"{name}-{count}.safetensors")
            part, count = {}, count + 1
        part[key] = arrays[key]
    safetensors.numpy.save_file(part, out / f"{name}-{count}.safetensors")


# --- data -------------------------------------------------------------------------------------------------------------


def load_tokens(path: Path, windows: int) -> Any:
    ids: Any = np.load(path)["ids"][:windows]
    return ids.astype(np.int32)


def prepare(source: Checkpoint, root: Path, out: Path) -> None:
    """Tokens of the healing files, and the evaluation sets, as .npz."""
    from edgekit.evaluate.choices import load_items
    from edgekit.evaluate.text import read_text

    out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(source)
    for name in FILES:
        if not (out / f"{name}.npz").exists():
            corpus = pack(encoder.documents(root / "heal" / f"{name}.jsonl.gz"), WINDOW, separator=encoder.separator)
            np.savez_compressed(out / f"{name}.npz", ids=corpus.ids.astype(np.uint16))
    sets: dict[str, Any] = {}
    texts = {"wikitext2": "text/wikitext2_valid.raw.txt.gz", **{name: f"longctx/{name}.txt.gz" for name in BOOKS}}
    for name, file in texts.items():
        ids = encoder.tokenizer.encode(read_text(root / file), add_special_tokens=False).ids[: WINDOW * WINDOWS]
        sets[name] = np.array(ids, np.uint16).reshape(WINDOWS, WINDOW)
    for task in TASKS:
        ids, starts, scored, size, owner, answer = [], [0], [], [], [], []
        for index, item in enumerate(load_items(root / "eval" / f"{task}.jsonl.gz")):
            answer.append(item.answer)
            for context, continuation in item.pairs:
                head = encoder.tokenizer.encode(context, add_special_tokens=False).ids
                tail = encoder.tokenizer.encode(continuation, add_special_tokens=False).ids
                ids += head + tail
                starts.append(len(ids))
                scored.append(len(tail))
                size.append(len(continuation.encode()))
                owner.append(index)
        for part, values in (
            ("ids", np.array(ids, np.uint16)), ("starts", np.array(starts)), ("scored", np.array(scored)),
            ("bytes", np.array(size)), ("item", np.array(owner)), ("answer", np.array(answer)),
        ):  # fmt: skip
            sets[f"{task}.{part}"] = values
    np.savez_compressed(out / "eval.npz", **sets)


if __name__ == "__main__":
    main()
