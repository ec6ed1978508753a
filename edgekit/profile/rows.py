"""The rows of a profile's report: what the stages found, as measurements, series and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit.bundle import MODEL, WEIGHTS, Bundle
from edgekit.profile.graph import OnnxGraph
from edgekit.profile.latency import Repetition
from edgekit.profile.options import Options
from edgekit.profile.pace import COMPUTING, READING
from edgekit.profile.power import PowerLog, Span
from edgekit.profile.roofline import Roofline, roofline
from edgekit.profile.stats import drift, measured
from edgekit.report import Measurement, Report, Row, Series, Table
from edgekit.runtime.budget import BASE_BYTES

if TYPE_CHECKING:
    from edgekit.profile.run import Findings

_MOST_POINTS = 4096
ENERGY = "energy per generated token"
FIRST, GAP = "time to first token", "gap between tokens"


@dataclass(frozen=True)
class EnergyRows:
    """The measurements of energy, and watts over time where there are any."""

    measurements: tuple[Measurement, ...]
    series: dict[str, Series]


def report(
    bundle: Bundle,
    path: Path,
    found: Findings,
    energy: EnergyRows,
    *,
    machine: dict[str, str],
    conditions: dict[str, str],
    versions: dict[str, str],
    flags: tuple[str, ...],
    created: str,
) -> Report:
    """Put everything together, in the order in which one reads it."""
    speed, samples = _speed(found)
    roof = _roofline(bundle, found)
    tables = {"llama-bench": llama_bench(bundle, found), "roofline": _read_table(bundle, found, roof)}
    tables |= {"memory": _account(bundle, found), "layers in memory": _layers(found.graph, bundle)}
    return Report(
        title="profile",
        subject=f"{path.resolve().name} {bundle.manifest.files[MODEL].sha256[:12]}",
        measurements=(
            *speed,
            *_loads(found),
            *energy.measurements,
            *_bounds(found, roof),
            *_memory(bundle, found),
        ),
        machine=machine,
        versions=versions,
        samples=samples,
        created=created,
        conditions=conditions,
        flags=flags,
        series={**_series(found), **energy.series},
        tables=tables | found.tables,
    )


def drift_of(gaps: Sequence[float]) -> float | None:
    """Last quarter over first, None for too few tokens."""
    return drift(gaps) if gaps else None


def _speed(found: Findings) -> tuple[list[Measurement], dict[str, tuple[float, ...]]]:
    options = found.options
    assert options.prompt_tokens is not None
    assert options.generate_tokens is not None
    figures: dict[str, tuple[str, list[float]]] = {}

    def add(name: str, unit: str, number: float) -> None:
        figures.setdefault(name, (unit, []))[1].append(number)

    for repetition in found.repetitions:
        add(f"pp{options.prompt_tokens}", "tok/s", options.prompt_tokens / _length(repetition.prefill))
        add(f"tg{options.generate_tokens}", "tok/s", options.generate_tokens / _length(repetition.decode))
        add(FIRST, "ms", 1e3 * repetition.first.first_token)
        add(f"{FIRST}: tokenise", "ms", 1e3 * repetition.first.tokenize)
        add(f"{FIRST}: prefill", "ms", 1e3 * repetition.first.prefill)
        add(f"{FIRST}: sample", "ms", 1e3 * repetition.first.sample)
        add(GAP, "ms", 1e3 * float(np.median(repetition.gaps)))
    for reading, computing in zip(found.reading, found.computing, strict=True):
        add(READING, "GB/s", reading)
        add(COMPUTING, "Gop/s", computing)
    lines = [measured(name, numbers, unit=unit) for name, (unit, numbers) in figures.items()]
    gaps = [1e3 * gap for repetition in found.repetitions for gap in repetition.gaps]
    at = next(index for index, line in enumerate(lines) if line.name == GAP) + 1
    change = drift_of(gaps)
    lines[at:at] = [
        *(Measurement(f"{GAP}, p{p}", float(np.percentile(gaps, p)), "ms", n=len(gaps)) for p in (50, 90, 99)),
        Measurement("drift of the gaps", change, "ratio", n=len(gaps), note="" if change else "too few tokens"),
    ]
    return lines, {name: tuple(numbers) for name, (_, numbers) in figures.items()}


def _loads(found: Findings) -> list[Measurement]:
    cold = None if found.cold_s is None else 1e3 * found.cold_s
    note = "digests, graph and cache, with the files in memory"
    return [
        Measurement("load, cold", cold, "ms", note=found.cold_reason or "the same, with the files on storage only"),
        Measurement("load, warm", 1e3 * found.warm_s, "ms", note=note),
    ]


def _memory(bundle: Bundle, found: Findings) -> list[Measurement]:
    peak, plan = found.peak, found.plan
    note = f"with {plan.context} tokens in the cache, as many as this run had"
    lines = [
        Measurement("size of graph and weights", _files(bundle) / 1e6, "MB"),
        Measurement("memory predicted", plan.total_bytes / 1e6, "MB", "predicted", note=note),
    ]
    figures = {
        "peak PSS": peak.peak_pss_bytes,
        "peak PSS, private": peak.peak_private_bytes,
        "peak PSS, file-backed": peak.peak_file_bytes,
        "peak RSS": peak.peak_rss_bytes,
    }
    for name, size in figures.items():
        note = "" if size is not None else "this system does not report it"
        lines.append(Measurement(name, None if size is None else size / 1e6, "MB", n=peak.n, note=note))
    for stage, faults in found.faults.items():
        note = f"of {faults.minor} page faults, the others found their page in memory"
        lines.append(Measurement(f"page faults from storage, {stage}", float(faults.major), "pages", note=note))
    return lines


def _account(bundle: Bundle, found: Findings) -> Table:
    """What the memory is for: what was predicted beside what /proc says of the mappings."""
    weights = sum(size for name, size in found.mapped.items() if Path(name).name in (WEIGHTS, MODEL))
    code = sum(
        size for name, size in found.mapped.items() if name.startswith("/") and Path(name).name not in (WEIGHTS, MODEL)
    )
    private = sum(size for name, size in found.mapped.items() if not name.startswith("/"))
    known = bool(found.mapped)
    rest = private - found.cache_bytes - (found.arena_bytes or 0)
    lines = (
        Row("weights", (found.plan.weights_bytes / 1e6, weights / 1e6 if known else None)),
        Row("keys and values", (found.plan.cache_bytes / 1e6, found.cache_bytes / 1e6 if known else None)),
        Row(
            "arena of onnxruntime",
            (found.plan.activation_bytes / 1e6, None if found.arena_bytes is None else found.arena_bytes / 1e6),
        ),
        Row("code, mapped", (None, code / 1e6 if known else None)),
        Row("heap and graph", (None, max(0, rest) / 1e6 if known else None)),
        Row("code and heap", (BASE_BYTES / 1e6, (code + max(0, rest)) / 1e6 if known else None)),
        Row("all", (found.plan.total_bytes / 1e6, (weights + code + private) / 1e6 if known else None)),
    )
    note = "PSS with the cache as full as this run made it; the arena as onnxruntime's own trace says"
    return Table("part", ("predicted, MB", "measured, MB"), lines, note)


def _layers(graph: OnnxGraph, bundle: Bundle) -> Table:
    """Weights by layer, and each layer's part of the cache for 1,000 tokens."""
    spec, sizes = bundle.spec, graph.layer_bytes()
    lines = []
    for name, size in sizes.items():
        index = int(name[6:]) if name.startswith("layer ") else -1
        cache = None
        if 0 <= index < len(spec.layers):
            cache = spec.layer_bytes(spec.layers[index], 1000) / 1e6
        lines.append(Row(name, (size / 1e6, cache)))
    return Table("layer", ("weights, MB", "cache of 1,000 tokens, MB"), tuple(lines))


def _roofline(bundle: Bundle, found: Findings) -> Roofline:
    options = found.options
    assert options.prompt_tokens is not None
    assert options.generate_tokens is not None
    gap = float(np.median([g for repetition in found.repetitions for g in repetition.gaps]))
    inside = float(np.median([r.inside / len(r.gaps) for r in found.repetitions]))
    executor = 0.0 if found.kernels_share is None else (1 - found.kernels_share) * inside
    prefill = float(np.median([options.prompt_tokens / _length(r.prefill) for r in found.repetitions]))
    cache = bundle.spec.cache_bytes(options.generate_tokens // 2)
    return roofline(
        bytes_per_token=sum(found.graph.read_bytes().values()) + cache,
        bandwidth_gbs=float(np.median(found.reading)),
        prefill_rate=prefill,
        decode_rate=1 / gap,
        overhead_s=gap - inside + executor,
    )


def _bounds(found: Findings, roof: Roofline) -> list[Measurement]:
    read = f"of {roof.bandwidth_gbs:.1f} in a plain loop"
    return [
        Measurement("bytes read per token", roof.bytes_per_token / 1e6, "MB", "predicted", note="weights and cache"),
        Measurement("decode: ceiling by bandwidth", roof.ceiling, "tok/s", "predicted", note="bandwidth over bytes"),
        Measurement("decode: predicted", roof.predicted, "tok/s", "predicted", note=roof.reason),
        Measurement("decode: read rate", roof.achieved_gbs, "GB/s", note=read),
    ]


def _read_table(bundle: Bundle, found: Findings, roof: Roofline) -> Table:
    """Bytes that one token reads, by group of tensors, and the time that they need at the measured bandwidth."""
    assert found.options.generate_tokens is not None
    groups = {**found.graph.read_bytes(), "keys and values": float(bundle.spec.token_bytes)}
    groups["keys and values"] *= found.options.generate_tokens // 2
    total = sum(groups.values()) or 1.0
    lines = [
        Row(name, (size / 1e6, 100 * size / total, size / roof.bandwidth_gbs / 1e6))
        for name, size in sorted(groups.items(), key=lambda pair: -pair[1])
    ]
    return Table(
        "tensors", ("bytes per token, MB", "share, %", "time at full bandwidth, ms"), tuple(lines), roof.reason
    )


def llama_bench(bundle: Bundle, found: Findings) -> Table:
    """llama-bench's columns for pp and tg: its mean and standard deviation, of the same samples."""
    options = found.options
    assert options.prompt_tokens is not None
    assert options.generate_tokens is not None
    lines = []
    for name, rates in (
        (f"pp{options.prompt_tokens}", [options.prompt_tokens / _length(r.prefill) for r in found.repetitions]),
        (f"tg{options.generate_tokens}", [options.generate_tokens / _length(r.decode) for r in found.repetitions]),
    ):
        sd = float(np.std(rates, ddof=1)) if len(rates) > 1 else None
        size, params = _files(bundle) / 2**20, found.graph.parameters() / 1e6
        lines.append(Row(name, (size, params, float(options.threads or 1), float(np.mean(rates)), sd)))
    note = f"model {bundle.spec.architecture}, backend edgekit; means, as llama-bench gives them"
    return Table("test", ("size, MiB", "params, M", "threads", "t/s", "± t/s"), tuple(lines), note)


def no_energy(reason: str) -> EnergyRows:
    """No joules, and why."""
    return EnergyRows((Measurement(ENERGY, None, "J", note=reason),), {})


def energy(log: PowerLog, found: Findings, options: Options) -> EnergyRows:
    """Gross, idle and net energy of both phases, joules a token, watts over time; each names its source."""
    source = log.source
    rest = log.energy([span for span in found.idle if _length(span) > 0])
    idle_w = options.estimate_w[1] if options.estimate_w else rest.watts
    facts = f"{source.name}: {', '.join(source.rails)}; {source.coverage}"
    idle_note = facts if idle_w is not None else rest.reason
    lines = [Measurement("power at rest", idle_w, "W", source.kind, note=idle_note)]
    tokens = {"prefill": options.prompt_tokens or 0, "decode": options.generate_tokens or 0}
    for phase, count in tokens.items():
        spans = [_span(repetition, phase) for repetition in found.repetitions]
        spent = log.energy(spans)
        note = spent.reason or f"{facts}; {spent.updates} updates, {spent.hz:.1f} a second"
        all_tokens = count * len(spans)
        net = None if spent.joules is None or idle_w is None else spent.joules - idle_w * spent.seconds
        per_token = None if spent.joules is None else spent.joules / all_tokens
        net_per_token = None if net is None else net / all_tokens
        net_note = spent.reason or idle_note if net is None else f"gross less {idle_w:.3g} W at rest"
        name = ENERGY if phase == "decode" else "energy per token of the prompt"
        lines += [
            Measurement(f"power, {phase}", spent.watts, "W", source.kind, n=len(spans), note=note),
            Measurement(f"energy, {phase}: gross", spent.joules, "J", source.kind, n=len(spans), note=note),
            Measurement(f"energy, {phase}: net", net, "J", source.kind, n=len(spans), note=net_note),
            Measurement(name, per_token, "J", source.kind, n=all_tokens, note=spent.reason or "gross"),
            Measurement(f"{name}, net", net_per_token, "J", source.kind, n=all_tokens, note=net_note),
        ]
        if phase == "decode" and per_token is not None:
            lines += _consequences(1000 * per_token, options)
    return EnergyRows(tuple(lines), _watts(log, found))


def _consequences(joules: float, options: Options) -> list[Measurement]:
    """CO2 and cost of 1,000 tokens, only of what the user says that a kWh carries."""
    kwh = joules / 3.6e6
    lines = []
    if options.grid_g_per_kwh is not None:
        note = f"gross energy x {options.grid_g_per_kwh:g} g/kWh, as given"
        lines.append(Measurement("CO2 of 1,000 tokens", kwh * options.grid_g_per_kwh, "g", "estimated", note=note))
    if options.price_per_kwh is not None:
        note = f"gross energy x {options.price_per_kwh:g} a kWh, as given"
        lines.append(Measurement("cost of 1,000 tokens", kwh * options.price_per_kwh, "", "estimated", note=note))
    return lines


def _watts(log: PowerLog, found: Findings) -> dict[str, Series]:
    times, watts = log.watts()
    zero = found.idle[0][0]
    points = _thin([(at - zero, watt) for at, watt in zip(times, watts, strict=True)])
    return {"power": Series("time", "s", "W", *_columns(points))} if len(points) > 1 else {}


def _series(found: Findings) -> dict[str, Series]:
    all_gaps = [1e3 * gap for repetition in found.repetitions for gap in repetition.gaps]
    gaps = _thin([(float(index), gap) for index, gap in enumerate(all_gaps)])
    series = {"gaps": Series("token", "", "ms", *_columns(gaps))}
    begin = found.peak.history[0][0] if found.peak.history else 0.0
    for name, key in (("memory, PSS", "pss_bytes"), ("memory, private", "private_bytes")):
        points = [
            (at - begin, getattr(memory, key) / 1e6)
            for at, memory in found.peak.history
            if getattr(memory, key) is not None
        ]
        if len(points) > 1:
            series[name] = Series("time", "s", "MB", *_columns(_thin(points)))
    return series


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = -(-len(points) // _MOST_POINTS) or 1
    return points[::step]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def _span(repetition: Repetition, phase: str) -> Span:
    return repetition.prefill if phase == "prefill" else repetition.decode


def _length(span: Span) -> float:
    return span[1] - span[0]


def _files(bundle: Bundle) -> int:
    return sum(record.size_bytes for name, record in bundle.manifest.files.items() if name.startswith(MODEL))
