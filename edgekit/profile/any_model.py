"""Any ONNX model, such as a vision or audio network: the same protocol with inputs that are made up.

Dimensions without a number get one by their name: batches 1, sequences 128, heights and widths 224, samples 16,000,
everything else 1; `dims` overrides them. Floats are drawn from a normal distribution, integers are 0 or 1 (they may be
indices into a table of unknown length), masks and truths are 1. A model whose inputs must agree with each other in
another way says so itself, and its message is passed on.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.errors import DeviceError, ModelError, UserError
from edgekit.host import host_device
from edgekit.manifest import now, versions
from edgekit.profile import operators
from edgekit.profile.conditions import conditions, other_load, read_cpu, read_health, throttling
from edgekit.profile.graph import read_graph
from edgekit.profile.memory import PeakMemory
from edgekit.profile.options import IDLE_S, IDLE_WITH_SENSOR_S, Options
from edgekit.profile.power import PowerLog, Span
from edgekit.profile.sensors import find_power
from edgekit.profile.stats import drift, measured
from edgekit.report import Measurement, Report, Row, Series, Table

Feed = dict[str, NDArray[Any]]

INPUTS = 4  # different ones, which take turns
RUNS = 20  # timed runs of one repetition
_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}  # fmt: skip
_SIZES = (
    (("batch",), 1), (("seq", "length", "token", "text"), 128),
    (("height", "width"), 224), (("sample", "audio"), 16000),
)  # fmt: skip
_MOST_ELEMENTS = 1 << 28


def profile_model(
    path: Path,
    options: Options = Options(),  # noqa: B008  frozen
    *,
    dims: Mapping[str, int] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measure an ONNX file. `dims` gives sizes to named dimensions.

    Raises UserError: not readable, an input that cannot be made up, a dimension that no input has; DeviceError:
    onnxruntime cannot load or run it.
    """
    graph = read_graph(path)
    threads = options.threads or host_device().threads or 1
    total = options.repetitions + 2 + options.operators
    on_step(0, total)
    facts, health, cpu = conditions(), read_health(), read_cpu()
    power = find_power(options.power)
    idle_s = (IDLE_WITH_SENSOR_S if power.source else IDLE_S) if options.idle_s is None else options.idle_s
    time.sleep(options.settle_s)
    log = None if power.source is None else PowerLog(power.source)
    if log:
        log.__enter__()
    try:
        idle = _rest(idle_s)
        with PeakMemory(hz=20) as peak:
            clock = time.perf_counter()
            session = _load(path, threads)
            loaded = time.perf_counter() - clock
            feeds = [make_inputs(session, dims or {}, seed=options.seed + index) for index in range(INPUTS)]
            _run(session, feeds[0])
            first = time.perf_counter() - clock
            for feed in feeds:
                _run(session, feed)
        on_step(1, total)
        spans, times = _repeat(session, feeds, options, peak, lambda done: on_step(1 + done, total))
    finally:
        if log:
            log.__exit__(None, None, None)
    shapes = {name: "x".join(map(str, values.shape)) or "scalar" for name, values in feeds[0].items()}
    samples = {
        "latency": tuple(1e3 * float(np.median(run)) for run in times),
        "rate": tuple(len(run) / sum(run) for run in times),
    }
    every = [1e3 * one for run in times for one in run]
    change = drift(every)
    rows = [
        measured("latency", samples["latency"], unit="ms"),
        *(Measurement(f"latency, p{p}", float(np.percentile(every, p)), "ms", n=len(every)) for p in (50, 90, 99)),
        Measurement("drift of the latency", change, "ratio", n=len(every), note="" if change else "too few runs"),
        measured("rate", samples["rate"], unit="1/s"),
        Measurement("load", 1e3 * loaded, "ms", note="graph and constants"),
        Measurement("load and first run", 1e3 * first, "ms"),
        Measurement("size of constants", sum(graph.layer_bytes().values()) / 1e6, "MB"),
        Measurement("parameters", graph.parameters() / 1e6, "M"),
        *(
            Measurement(name, None if size is None else size / 1e6, "MB", n=peak.n, note="" if size else "not reported")
            for name, size in (
                ("peak PSS", peak.peak_pss_bytes), ("peak PSS, private", peak.peak_private_bytes),
                ("peak PSS, file-backed", peak.peak_file_bytes), ("peak RSS", peak.peak_rss_bytes),
            )
        ),
        *_energy(log, power.reason, spans, idle, len(every)),
    ]  # fmt: skip
    tables = {"inputs": Table("input", ("elements",), tuple(
        Row(f"{name}: {shapes[name]} {values.dtype}", (float(values.size),)) for name, values in feeds[0].items()
    ), "made up: random numbers of these shapes")}  # fmt: skip
    if options.operators:
        del session
        gc.collect()
        tables |= _operators(path, threads, feeds)
    on_step(total, total)
    flags = list(throttling(health, read_health()))
    shares = other_load(cpu, read_cpu())
    if shares and shares[0] > 0.1:
        flags.append(f"other programs used {shares[0]:.0%} of the processors during the run")
    return Report(
        title="profile", subject=path.name, measurements=tuple(rows),
        machine={**host_device().fingerprint(), "threads": str(threads)},
        versions=versions("numpy", "onnxruntime"), samples=samples, created=now(), conditions=facts,
        flags=tuple(flags), series=_series(peak, every), tables=tables,
    )  # fmt: skip


def make_inputs(session: ort.InferenceSession, dims: Mapping[str, int], *, seed: int) -> Feed:
    """One input of each name. Raises UserError: an unknown dimension, or a type that has no numbers, or too large."""
    generator = np.random.default_rng(seed)
    named = {dim for value in session.get_inputs() for dim in value.shape if isinstance(dim, str)}
    if unknown := sorted(set(dims) - named):
        raise UserError(f"--dim must name a dimension of an input: got {unknown[0]!r}, known are {sorted(named)}")
    feed: Feed = {}
    for value in session.get_inputs():
        kind = _TYPES.get(value.type)
        if kind is None:
            raise UserError(f"inputs must be tensors of numbers to be made up: {value.name!r} is {value.type}")
        shape = [_size(dim, index, len(value.shape), dims) for index, dim in enumerate(value.shape)]
        if np.prod(shape, dtype=np.float64) > _MOST_ELEMENTS:
            raise UserError(
                f"an input must have up to {_MOST_ELEMENTS} elements: {value.name!r} has {shape}; use --dim"
            )
        if np.issubdtype(kind, np.floating):
            feed[value.name] = generator.normal(size=shape).astype(kind)
        elif kind is np.bool_ or "mask" in value.name.lower():
            feed[value.name] = np.ones(shape, kind)
        else:
            feed[value.name] = generator.integers(0, 2, shape).astype(kind)
    return feed


def _size(dim: int | str | None, index: int, rank: int, dims: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return max(dim, 1)
    name = (dim or "").lower()
    if dim in dims:
        return dims[str(dim)]
    for words, size in _SIZES:
        if any(word in name for word in words):
            return size
    if rank == 4 and index >= 2:  # pictures, whose axes often have no name
        return 224
    return 1


def _load(path: Path, threads: int, trace: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime raises classes of its own, with no common base
        raise ModelError(f"onnxruntime {ort.__version__} cannot load {path}: {_first_line(problem)}") from problem


def _run(session: ort.InferenceSession, feed: Feed) -> None:
    try:
        session.run(None, feed)
    except Exception as problem:
        shapes = ", ".join(f"{name} {values.shape}" for name, values in feed.items())
        raise DeviceError(
            f"the model does not run with inputs of {shapes}: {_first_line(problem)}; give sizes with --dim NAME=N"
        ) from problem


def _repeat(
    session: ort.InferenceSession,
    feeds: list[Feed],
    options: Options,
    peak: PeakMemory,
    on_repetition: Callable[[int], None],
) -> tuple[list[Span], list[list[float]]]:
    generator = np.random.default_rng(options.seed)
    spans, times = [], []
    for repetition in range(options.repetitions):
        order = generator.permutation(RUNS) % len(feeds)
        ticks = [time.perf_counter()]
        for index in order.tolist():
            _run(session, feeds[index])
            ticks.append(time.perf_counter())
        spans.append((ticks[0], ticks[-1]))
        times.append(np.diff(ticks).tolist())
        peak.look()
        on_repetition(repetition + 1)
    return spans, times


def _operators(path: Path, threads: int, feeds: list[Feed]) -> dict[str, Table]:
    with tempfile.TemporaryDirectory() as folder:
        session = _load(path, threads, Path(folder) / "trace")
        for _ in range(3):
            for feed in feeds:
                _run(session, feed)
        trace = operators.read_trace(Path(session.end_profiling()))
    warm = operators.Trace(trace.runs[len(feeds) :], trace.arena_bytes)
    tables = {
        "operators": operators.operator_table(warm, prefills=0),
        "layers": operators.layer_table(warm, prefills=0),
        "slowest nodes": operators.top_nodes(warm, prefills=0),
    }
    return {
        name: Table(t.label, ("nodes", "ms/run", "share, %"),
                    tuple(Row(row.label, (row.values[0], *row.values[2:])) for row in t.rows), t.note)
        for name, t in tables.items()
    }  # fmt: skip


def _energy(log: PowerLog | None, reason: str, spans: list[Span], idle: Span, runs: int) -> list[Measurement]:
    if log is None:
        return [Measurement("energy per run", None, "J", note=reason)]
    spent, rest = log.energy(spans), log.energy([idle])
    facts = f"{log.source.name}: {', '.join(log.source.rails)}; {log.source.coverage}"
    net = None if spent.joules is None or rest.watts is None else (spent.joules - rest.watts * spent.seconds) / runs
    gross = None if spent.joules is None else spent.joules / runs
    return [
        Measurement("power at rest", rest.watts, "W", log.source.kind, note=rest.reason or facts),
        Measurement("power", spent.watts, "W", log.source.kind, note=spent.reason or facts),
        Measurement("energy per run", gross, "J", log.source.kind, n=runs, note=spent.reason or f"gross; {facts}"),
        Measurement("energy per run, net", net, "J", log.source.kind, n=runs, note=spent.reason or rest.reason),
    ]


def _series(peak: PeakMemory, latencies: list[float]) -> dict[str, Series]:
    begin = peak.history[0][0]
    found = {"gaps": Series("run", "", "ms", tuple(map(float, range(len(latencies)))), tuple(latencies))}
    for name, key in (("memory, PSS", "pss_bytes"), ("memory, private", "private_bytes")):
        points = [(at - begin, getattr(memory, key)) for at, memory in peak.history]
        known = [(at, size / 1e6) for at, size in points if size is not None]
        if len(known) > 1:
            found[name] = Series("time", "s", "MB", tuple(at for at, _ in known), tuple(size for _, size in known))
    return found


def _rest(seconds: float) -> Span:
    begin = time.perf_counter()
    time.sleep(seconds)
    return begin, time.perf_counter()


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return text[0][:300] if text else type(problem).__name__
