"""Where the time goes inside the graph: onnxruntime's profile, folded into our layers.

onnxruntime writes one event a node and run, with the node's name, from which the layer follows, and one `model_run`
around them. Taking the times costs time itself, some microseconds a node, so a traced engine runs apart from what is
reported as speed, and here only shares and the order of operators should be believed.
Source: onnxruntime, docs/performance/tune-performance/profiling-tools; Google, Trace Event Format.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle import MODEL, Bundle
from edgekit.errors import DeviceError
from edgekit.profile.graph import layer_of
from edgekit.report import Row, Table
from edgekit.runtime.budget import PREFILL_CHUNK
from edgekit.runtime.engine import Engine

DECODE_TOKENS = 24
_WARM_TOKENS = 4
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """One node in one run, in microseconds since the session began."""

    name: str
    op: str
    begin_us: float
    duration_us: float


@dataclass(frozen=True)
class ModelRun:
    """One run of the graph with its nodes, in order."""

    begin_us: float
    duration_us: float
    nodes: tuple[NodeTime, ...]

    @property
    def node_us(self) -> float:
        return sum(node.duration_us for node in self.nodes)


@dataclass(frozen=True)
class Trace:
    """What onnxruntime saw: its runs, and the most memory that its arena held (None where no event says so)."""

    runs: tuple[ModelRun, ...]
    arena_bytes: int | None


def trace_bundle(bundle: Bundle, *, context: int, threads: int, prompt_tokens: int) -> tuple[Trace, int]:
    """Trace a prefill of `prompt_tokens`, in as many runs as the second number says, and then 24 decoded tokens."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(bundle.file(MODEL), bundle.spec, context=context, threads=threads, trace=Path(folder) / "trace")
        prompt_tokens = min(prompt_tokens, context - DECODE_TOKENS - _WARM_TOKENS)
        ids = np.random.default_rng(0).integers(0, bundle.spec.vocabulary, max(1, prompt_tokens)).tolist()
        engine.forward(ids)
        engine.rewind(0)
        engine.forward(ids)
        token = ids[0]
        for _ in range(min(DECODE_TOKENS + _WARM_TOKENS, context - len(ids))):
            token = int(engine.forward([token])[-1].argmax())
        trace = read_trace(engine.end_trace())
    chunks = -(-len(ids) // PREFILL_CHUNK)
    warm = min(_WARM_TOKENS, max(0, len(trace.runs) - 2 * chunks - 1))
    kept = trace.runs[chunks : 2 * chunks] + trace.runs[2 * chunks + warm :]
    return Trace(kept, trace.arena_bytes), chunks


def read_trace(path: Path) -> Trace:
    """Read onnxruntime's file of events. Raises DeviceError: it is not one."""
    try:
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        assert isinstance(events, list)
        runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda event: float(event["ts"]))
        nodes = sorted(
            (e for e in events if e.get("cat") == "Node" and str(e.get("name")).endswith(_SUFFIX)),
            key=lambda event: float(event["ts"]),
        )
        return Trace(tuple(_runs(runs, nodes)), _arena(nodes))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as problem:
        raise DeviceError(f"onnxruntime's profile could not be read: {problem!r}; pass --no-operators") from problem


def _runs(runs: Sequence[dict[str, Any]], nodes: Sequence[dict[str, Any]]) -> list[ModelRun]:
    found, at = [], 0
    for run in runs:
        begin, duration = float(run["ts"]), float(run["dur"])
        inside = []
        while at < len(nodes) and float(nodes[at]["ts"]) < begin + duration:
            event = nodes[at]
            at += 1
            if float(event["ts"]) >= begin:
                name = str(event["name"]).removesuffix(_SUFFIX)
                inside.append(NodeTime(name, str(event["args"]["op_name"]), float(event["ts"]), float(event["dur"])))
        found.append(ModelRun(begin, duration, tuple(inside)))
    return found


def _arena(nodes: Sequence[dict[str, Any]]) -> int | None:
    held = [int(node["args"]["mem_arena_held"]) for node in nodes if "mem_arena_held" in node["args"]]
    return max(held, default=None)


def operator_table(trace: Trace, *, prefills: int) -> Table:
    """Each kind of operator: nodes, milliseconds of the prefill and of a token, share of decoding."""
    return _table("operator", trace, prefills, lambda node: node.op, sort=True)


def layer_table(trace: Trace, *, prefills: int) -> Table:
    """Each layer the same, in the order of the graph."""
    return _table("layer", trace, prefills, lambda node: layer_of(node.name), sort=False)


def top_nodes(trace: Trace, *, prefills: int, count: int = 10) -> Table:
    """The single nodes that decoding spends most time in."""
    table = _table("node", trace, prefills, lambda node: node.name, sort=True)
    return Table(table.label, table.columns, table.rows[:count], table.note)


def kernel_share(trace: Trace, *, prefills: int) -> float | None:
    """Share of a decode run's time inside its nodes; the rest is onnxruntime's executor."""
    runs = trace.runs[prefills:]
    total = sum(run.duration_us for run in runs)
    return sum(run.node_us for run in runs) / total if total else None


def _table(label: str, trace: Trace, prefills: int, key: Callable[[NodeTime], str], *, sort: bool) -> Table:
    phases = (trace.runs[:prefills], trace.runs[prefills:])
    order = list(dict.fromkeys(key(node) for run in trace.runs for node in run.nodes))
    prefill = dict.fromkeys(order, 0.0)
    for run in phases[0]:
        for node in run.nodes:
            prefill[key(node)] += node.duration_us / 1e3
    decode: dict[str, list[float]] = {name: [0.0] * len(phases[1]) for name in order}
    for index, run in enumerate(phases[1]):
        for node in run.nodes:
            decode[key(node)][index] += node.duration_us / 1e3
    counts = Counter(key(node) for node in (phases[1] or phases[0])[-1].nodes) if trace.runs else Counter()
    times = {name: statistics.median(each) if each else 0.0 for name, each in decode.items()}
    total = sum(times.values()) or 1.0
    rows = [Row(name, (float(counts[name]), prefill[name], times[name], 100 * times[name] / total)) for name in order]
    if sort:
        rows.sort(key=lambda row: -(row.values[2] or 0))
    note = "medians over tokens, of a run of its own with onnxruntime's profiling on, which slows small nodes down"
    return Table(label, ("nodes", "prefill, ms", "decode, ms/token", "share of decode, %"), tuple(rows), note)


def chrome_trace(trace: Trace, *, prefills: int) -> str:
    """The runs as JSON for Perfetto or chrome://tracing: one track for runs, one for layers, one for nodes."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in enumerate(("runs", "layers", "nodes"), 1)
    ]

    def add(tid: int, name: str, begin: float, duration: float, **args: object) -> None:
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": tid,
                "name": name,
                "ts": begin,
                "dur": duration,
                "cat": "edgekit",
                "args": args,
            }
        )

    for index, run in enumerate(trace.runs):
        add(1, "prefill" if index < prefills else "decode", run.begin_us, run.duration_us)
        layers: list[tuple[str, float, float]] = []
        for node in run.nodes:
            end = node.begin_us + node.duration_us
            layer = layer_of(node.name)
            if layers and layers[-1][0] == layer:
                layers[-1] = (layer, layers[-1][1], end)
            else:
                layers.append((layer, node.begin_us, end))
            add(3, node.name, node.begin_us, node.duration_us, op=node.op)
        for layer, begin, end in layers:
            add(2, layer, begin, end - begin)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
