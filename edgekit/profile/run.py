"""A whole profile of a bundle, in the order of the protocol; `profile` is also what a remote host runs.

    settle, idle baseline | load cold (elsewhere), load warm, warm-up, fill: memory is watched | N repetitions: nothing
    is watched but power, and memory is read between them | idle again | what costs time of its own: context sweep,
    texts, operators, thread sweep

Memory is watched where nothing is timed, because reading it takes a lock that page faults need: so profiling costs the
timed spans nothing but two looks at the clock and a reading of the power sensor ten times a second.
Source: the protocol joins llama-bench's (warm-up, repetitions), MLPerf's (idle baseline, energy of the timed phase) and
OpenVINO llm_bench's (another prompt each repetition).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgekit.bundle import MODEL, WEIGHTS, Bundle
from edgekit.errors import UserError
from edgekit.host import host_device
from edgekit.manifest import now, versions
from edgekit.profile import operators, rows, threads
from edgekit.profile.conditions import Cpu, Health, conditions, other_load, read_cpu, read_health, throttling
from edgekit.profile.graph import OnnxGraph, read_graph
from edgekit.profile.latency import Repetition, at_depth, cold_load, fill, first_token, generate, load, repeat
from edgekit.profile.memory import Faults, PeakMemory, mapped_bytes, read_faults
from edgekit.profile.meters import align, read_csv, serial
from edgekit.profile.options import IDLE_S, IDLE_WITH_SENSOR_S, SWEEP_TOKENS, Options
from edgekit.profile.pace import Pace
from edgekit.profile.power import PowerLog, Source, Span, estimated
from edgekit.profile.sensors import Found, find_power
from edgekit.report import Report, Row, Table
from edgekit.runtime.budget import MemoryPlan, plan_memory
from edgekit.runtime.session import Session
from edgekit.runtime.threads import keep


@dataclass
class Findings:
    """What the stages of one profile found; `edgekit.profile.rows` makes the report's rows of it."""

    options: Options
    cold_s: float | None
    cold_reason: str
    warm_s: float
    repetitions: list[Repetition]
    reading: list[float]
    computing: list[float]
    peak: PeakMemory
    plan: MemoryPlan
    faults: dict[str, Faults]
    mapped: dict[str, int]
    cache_bytes: int
    graph: OnnxGraph
    work: list[Span]
    idle: list[Span]
    kernels_share: float | None = None
    arena_bytes: int | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    trace: str = ""


@dataclass(frozen=True)
class Profile:
    """A report, and the operators' trace as JSON for Perfetto ("" when no operators were asked for)."""

    report: Report
    trace: str


def profile(
    path: Path,
    options: Options = Options(),  # noqa: B008  frozen
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measure a bundle; `on_step` is told (steps done, in all).

    Raises UserError for options that cannot be, and what `Session.open` raises.
    """
    return profile_with_trace(path, options, on_step=on_step).report


def profile_with_trace(
    path: Path,
    options: Options = Options(),  # noqa: B008  frozen
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """The same, with the trace of the operators' run."""
    bundle = Bundle.open(path)
    options = options.fit(options.context or bundle.spec.context_length)
    plan_memory(bundle.spec, context=options.context or bundle.spec.context_length).refuse_if_too_large()
    power = _power(options)
    steps = _Steps(options, on_step)
    facts, health, cpu = conditions(), read_health(), read_cpu()
    if power.source is None:
        found = _measure(path, options, steps, None)
        energy = rows.no_energy(power.reason)
    else:
        with PowerLog(power.source) as log:
            found = _measure(path, options, steps, log)
        energy = rows.energy(log, found, options)
    if options.power.startswith("csv:"):
        energy = _from_csv(Path(options.power[4:]), found, options)
    flags = _flags(found, health, read_health(), cpu, read_cpu())
    found = _extras(path, bundle, found, steps)
    report = rows.report(
        bundle, path, found, energy,
        machine={**host_device().fingerprint(), "threads": str(found.options.threads)},
        conditions={**facts, **_conditions(bundle, found, health, cpu)}, flags=flags,
        versions={**versions("numpy", "onnxruntime", "tokenizers"), "kernels": steps.kernels}, created=now(),
    )  # fmt: skip
    return Profile(report, found.trace)


class _Steps:
    """Counts the steps of a profile for its progress, and remembers which kernels ran."""

    def __init__(self, options: Options, tell: Callable[[int, int], None]) -> None:
        extra = len(options.depths) + len(options.prompts) * options.repetitions + options.operators
        self.total = 2 + options.repetitions + extra + len(set(options.sweep_threads)) * (threads.TURNS + 1)
        self.done = 0
        self.kernels = ""
        self._tell = tell
        tell(0, self.total)

    def step(self) -> None:
        self.done += 1
        self._tell(self.done, self.total)


def _power(options: Options) -> Found:
    if options.estimate_w:
        return Found(estimated(*options.estimate_w), ())
    if options.power.startswith("csv:"):
        return Found(None, ("a meter's file is read after the run",))
    if options.power.startswith("serial:"):
        device, _, baud = options.power[7:].partition("@")
        if baud and not baud.isdecimal():
            raise UserError(f"--power serial:DEVICE@BAUD needs a whole number: got {baud!r}")
        return Found(serial(Path(device), baud=int(baud or 115200)), ())
    return find_power(options.power)


def _measure(path: Path, options: Options, steps: _Steps, log: PowerLog | None) -> Findings:
    """Everything that is timed with the sensor on."""
    assert options.prompt_tokens is not None
    assert options.generate_tokens is not None
    listens = (log is not None and log.source.kind == "measured") or options.power.startswith("csv:")
    idle_s = (IDLE_WITH_SENSOR_S if listens else IDLE_S) if options.idle_s is None else options.idle_s
    time.sleep(options.settle_s)
    idle = [_rest(idle_s)]
    steps.step()
    cold_s, reason = None, "left out (--no-cold)"
    if options.cold:
        cold_s, reason = cold_load(path, context=options.context, threads=options.threads)
    before = read_faults()
    with PeakMemory(hz=20) as peak:
        session, warm_s = load(path, context=options.context, threads=options.threads)
        engine = session.engine
        steps.kernels = engine.kernels
        loaded = read_faults()
        repeat(session, options.prompt_tokens, options.generate_tokens, seed=options.seed)
        depth = max(options.prompt_tokens, options.generate_tokens, *(d + 2 * SWEEP_TOKENS for d in options.depths))
        fill(engine, min(depth, engine.context), seed=options.seed)
        deepest = len(engine.tokens)
        peak.look()
        mapped = mapped_bytes()
    steps.step()
    warmed = read_faults()
    seeds = np.random.default_rng(options.seed).permutation(options.repetitions) + 1
    repetitions, reading, computing = [], [], []
    begin = time.perf_counter()
    with Pace(path / WEIGHTS, threads=engine.threads) as pace:
        for seed in seeds.tolist():
            reading.append(pace.reading_gbs())
            computing.append(pace.computing_gops())
            repetitions.append(
                repeat(session, options.prompt_tokens, options.generate_tokens, seed=options.seed + seed)
            )
            peak.look()
            steps.step()
    work = [(begin, time.perf_counter())]
    if listens:
        idle.append(_rest(min(idle_s, 10)))
    stages = [before, loaded, warmed, read_faults()]
    names = ("loading", "warming up", "measuring")
    found = Findings(
        options=replace(options, context=engine.context, threads=engine.threads),
        cold_s=cold_s, cold_reason=reason, warm_s=warm_s, repetitions=repetitions, reading=reading, computing=computing,
        peak=peak, plan=plan_memory(session.bundle.spec, context=deepest), faults={name: _less(late, early) for name,
        (early, late) in zip(names, pairwise(stages), strict=True)}, mapped=mapped,
        cache_bytes=session.bundle.spec.cache_bytes(deepest), graph=read_graph(session.bundle.file(MODEL)), work=work,
        idle=idle,
    )  # fmt: skip
    if options.depths:
        found.tables["context sweep"] = _sweep_depths(session, options.depths, steps)
    if options.prompts:
        found.tables["texts"] = _answer(session, options, steps)
    return found


def _rest(seconds: float) -> Span:
    begin = time.perf_counter()
    time.sleep(seconds)
    return begin, time.perf_counter()


def _less(a: Faults, b: Faults) -> Faults:
    return Faults(a.minor - b.minor, a.major - b.major)


def _sweep_depths(session: Session, depths: Sequence[int], steps: _Steps) -> Table:
    """Rates with so many tokens in the cache, the median of three."""
    lines = []
    for depth in sorted(set(depths)):
        times = [at_depth(session.engine, depth, seed=turn) for turn in range(3)]
        prefill, decode = (SWEEP_TOKENS / statistics.median(column) for column in zip(*times, strict=True))
        cache = session.bundle.spec.cache_bytes(depth) / 1e6
        lines.append(Row(str(depth), (prefill, decode, 1e3 / decode, cache)))
        steps.step()
    columns = (f"pp{SWEEP_TOKENS}, tok/s", f"tg{SWEEP_TOKENS}, tok/s", "gap, ms", "cache, MB")
    return Table("tokens in the cache", columns, tuple(lines), "llama-bench's @ d; medians of 3")


def _answer(session: Session, options: Options, steps: _Steps) -> Table:
    """Time to first token and decode rate of each text, which come in another order each repetition."""
    generator = np.random.default_rng(options.seed)
    firsts: list[list[float]] = [[] for _ in options.prompts]
    rates: list[list[float]] = [[] for _ in options.prompts]
    counts = [len(session.encode(text)) for text in options.prompts]
    assert options.generate_tokens is not None
    for _ in range(options.repetitions):
        for index in generator.permutation(len(options.prompts)).tolist():
            firsts[index].append(1e3 * first_token(session, options.prompts[index]).first_token)
            (begin, end), _ = generate(session.engine, 0, options.generate_tokens)
            rates[index].append(options.generate_tokens / (end - begin))
            steps.step()
    lines = [
        Row(f"{index + 1}: {' '.join(text.split())[:40]}",
            (float(count), statistics.median(first), max(first), statistics.median(rate)))
        for index, (text, count, first, rate) in enumerate(zip(options.prompts, counts, firsts, rates, strict=True))
    ]  # fmt: skip
    columns = ("tokens", "first token, ms", "slowest, ms", "decode, tok/s")
    return Table("text", columns, tuple(lines), f"medians of {options.repetitions}, in another order each repetition")


def _extras(path: Path, bundle: Bundle, found: Findings, steps: _Steps) -> Findings:
    """What needs engines of its own: operators and the thread sweep."""
    options = found.options
    assert options.context is not None
    assert options.threads is not None
    assert options.prompt_tokens is not None
    gc.collect()
    if options.operators:
        trace, prefills = operators.trace_bundle(
            bundle, context=options.context, threads=options.threads, prompt_tokens=options.prompt_tokens
        )
        found.tables["operators"] = operators.operator_table(trace, prefills=prefills)
        found.tables["layers"] = operators.layer_table(trace, prefills=prefills)
        found.tables["slowest nodes"] = operators.top_nodes(trace, prefills=prefills)
        found.kernels_share = operators.kernel_share(trace, prefills=prefills)
        found.arena_bytes = trace.arena_bytes
        found.trace = operators.chrome_trace(trace, prefills=prefills)
        steps.step()
    if options.sweep_threads:
        rates = threads.sweep(bundle, options.sweep_threads, context=options.context, on_turn=steps.step)
        prefill, decode = threads.best(rates)
        keep(bundle, prefill, decode)
        lines = tuple(Row(str(rate.threads), (rate.prefill, rate.decode)) for rate in rates)
        note = f"best: {prefill} for prefill, {decode} for decode; kept for this device and bundle"
        found.tables["thread sweep"] = Table("threads", ("prefill, tok/s", "decode, tok/s"), lines, note)
    return found


def _from_csv(path: Path, found: Findings, options: Options) -> rows.EnergyRows:
    """Energy from a meter's own log, shifted to where it shows the run's load."""
    around = (found.idle[0][0], found.idle[-1][1])
    log, agreement = align(read_csv(path), found.work, around=around)
    note = f"a meter's log, {path.name}, shifted to the run's load (agreement {agreement:.2f})"
    source = Source("csv", (path.name,), note, lambda: ())
    return rows.energy(PowerLog(source, times=list(log.times), values=[(watt,) for watt in log.watts]), found, options)


def _flags(found: Findings, before: Health, after: Health, cpu: Cpu | None, later: Cpu | None) -> tuple[str, ...]:
    flags = list(throttling(before, after))
    gaps = [gap for repetition in found.repetitions for gap in repetition.gaps]
    if (drift := rows.drift_of(gaps)) is not None and not 0.9 <= drift <= 1.1:
        flags.append(f"the gaps drifted: the last quarter's median is {drift:.2f} times the first's")
    load_of_others = other_load(cpu, later)
    if load_of_others and load_of_others[0] > 0.1:
        flags.append(f"other programs used {load_of_others[0]:.0%} of the processors during the run")
    if load_of_others and load_of_others[1] > 0.02:
        flags.append(f"the hypervisor gave {load_of_others[1]:.0%} of the processors' time to others")
    return tuple(flags)


def _conditions(bundle: Bundle, found: Findings, health: Health, cpu: Cpu | None) -> dict[str, str]:
    facts = {"context": str(found.options.context), "cache type": bundle.spec.cache_name}
    if health.temperature_c is not None:
        facts["temperature"] = f"{health.temperature_c:.0f} °C before"
    if health.mhz is not None:
        facts["clock"] = f"{health.mhz:.0f} MHz before"
    load_of_others = other_load(cpu, read_cpu())
    if load_of_others:
        facts["other programs"] = f"{load_of_others[0]:.0%} of the processors"
    return facts
