"""Whether the profiler is right: against a stopwatch, its own cost, its predictions, and its verdicts on two runs.

    stopwatch     a process does what llama-bench does (prefill 512, decode 128) and writes a mark before and after
                  each; another process takes the time at the marks. `edgekit profile` must agree within 3%
    overhead      prefill and decode plain, as a profile does them, and with its sensor read 30 times as often, in
                  turns. The last shows the cost clearly, and a thirtieth of it is a profile's: under 1%
    memory        predicted over the measured peak of PSS, the context full, each in a process of its own
    refusal       under a limit of address space, and in a memory cgroup, that is too small, the command must end with
                  exit 4 before it loads
    turns         `edgekit compare` of a bundle with itself and with itself slowed down by a tenth, which take turns
    reports       the same of profiles that were made one after the other
    sensors       where the machine has none: null with a reason, and exit 0

It needs no peer, and a machine that does nothing else. `--into FILE` keeps each section when it ends, and takes those
that are there already, so that a long run may be made in pieces; `--only SECTION` runs that one alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import Benchmark, Check

from edgekit.compress import compress
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.host import host_device
from edgekit.model.sources import open_model
from edgekit.profile.compare import Verdict, compare
from edgekit.profile.stats import paired
from edgekit.profile.turns import take_turns
from edgekit.recipe import load_recipe
from edgekit.report import Measurement, Report

PROMPT, ANSWER, CONTEXT = 512, 128, 1024
TRIALS = 10
MORE_OFTEN = 30  # readings of the sensor, over those of a profile
WORK = [sys.executable, str(Path(__file__).with_name("profiler_work.py"))]
EDGEKIT = [sys.executable, "-c", "from edgekit.cli.main import main; main()"]

Section = Callable[[Benchmark, Path, bool], None]


def main() -> None:
    options = _arguments()
    kept = _kept(options.into)
    bench = Benchmark("profiler")
    with contextlib.ExitStack() as stack:
        bundle = options.bundle
        for name in options.only or SECTIONS:
            part = Benchmark(name)
            if name in kept and not options.only:
                part.measurements, part.checks = kept[name]
            else:
                bundle = bundle or _make_bundle(Path(stack.enter_context(tempfile.TemporaryDirectory())))
                SECTIONS[name](part, bundle, options.quick)
                kept[name] = part.measurements, part.checks
                if options.into:
                    _keep(options.into, kept)
            bench.measurements += part.measurements
            bench.checks += part.checks
    bench.finish(as_json=options.json)


def stopwatch(bench: Benchmark, bundle: Path, quick: bool) -> None:
    """Our figures of one repetition beside those of a clock in another process, over the same spans."""
    off: dict[str, list[float]] = {"prefill": [], "decode": []}
    child = subprocess.Popen(
        [*WORK, "marks", str(bundle), str(PROMPT), str(ANSWER), str(CONTEXT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    for block in range((6 if quick else 10) + 1):
        child.stdin.write(f"{block}\n")
        child.stdin.flush()
        spans = {}
        for phase in off:
            assert child.stdout.readline() == f"begin {phase}\n"
            clock = time.perf_counter()
            assert child.stdout.readline() == f"end {phase}\n"
            spans[phase] = time.perf_counter() - clock
        ours = json.loads(child.stdout.readline())
        for phase, seconds in spans.items() if block else ():
            off[phase].append(100 * abs(ours[phase] / seconds - 1))
    child.stdin.close()
    child.wait()
    for phase, shares in off.items():
        value = bench.samples(f"{phase}: off an outside stopwatch", shares, unit="%")
        bench.at_most(f"{phase}: off an outside stopwatch, %", value, 3.0)


def overhead(bench: Benchmark, bundle: Path, quick: bool) -> None:
    """What a profile adds to the spans that it times, as the ratio to plain loops in turns.

    Two estimates. Directly: profiled over plain; noise of a shared machine is larger than what it costs. And by the
    dose: with the sensor read `MORE_OFTEN` times as often the cost is plain, and a profile's is that share of it.
    """
    rounds = 16 if quick else 96
    done = _run([*WORK, "overhead", str(bundle), str(rounds), str(MORE_OFTEN)])
    for phase, ways in json.loads(done).items():
        plain, profiled, often = (_pairs(seconds) for seconds in ways)
        direct = paired([b / a for a, b in zip(plain, profiled, strict=True)])
        dose = paired([b / a for a, b in zip(plain, often, strict=True)])
        assert direct.ratio is not None
        assert dose.ratio is not None
        assert dose.low is not None
        assert dose.high is not None
        note = f"{rounds} times there and back; 95% {_percent(direct.low)} to {_percent(direct.high)}"
        bench.value(f"overhead, {phase}: directly", 100 * (direct.ratio - 1), "%", n=rounds, note=note)
        note = f"95% {_percent(dose.low)} to {_percent(dose.high)}"
        bench.value(f"overhead, {phase}: sensor read {MORE_OFTEN} times as often", 100 * (dose.ratio - 1), "%",
                    n=rounds, note=note)  # fmt: skip
        bench.at_most(f"overhead, {phase}: directly, %", 100 * (direct.ratio - 1), 1.0)
        highest = 100 * (dose.high - 1) / MORE_OFTEN
        bench.at_most(f"overhead, {phase}: by the dose, upper end of the 95% interval, %", highest, 1.0)


def _pairs(seconds: list[float]) -> list[float]:
    """Sums of there and back."""
    return [there + back for there, back in zip(seconds[::2], seconds[1::2], strict=True)]


def _percent(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{100 * (ratio - 1):+.2f}%"


def memory(bench: Benchmark, bundle: Path, quick: bool) -> None:
    for context in (512, 4096, 8192):
        predicted, measured = json.loads(_run([*WORK, "memory", str(bundle), str(context)]))
        note = "pages of libraries that other processes map too counted whole"
        bench.value(f"peak PSS, context {context} full", measured / 1e6, "MB", note=note)
        bench.value(f"memory predicted, context {context}", predicted / 1e6, "MB")
        bench.at_most(f"memory predicted, context {context}: off by, %", 100 * abs(predicted / measured - 1), 10.0)


def refusal(bench: Benchmark, bundle: Path, quick: bool) -> None:
    """With less than the model needs, the command must end with exit 4 and the numbers."""
    words = [*EDGEKIT, "profile", str(bundle), "--settle", "0"]
    _refused(bench, "a limit of address space", ["bash", "-c", 'ulimit -v 900000; exec "$@"', "bash", *words])
    with memory_cgroup(120_000_000) as join:
        if join is None:
            print("no memory cgroup may be made here: the refusal in one is not shown", file=sys.stderr)
        else:
            _refused(bench, "a memory cgroup of 120 MB", [*join, *words])


def _refused(bench: Benchmark, limit: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.returncode == 4 and "must fit in memory" in done.stderr
    bench.value(f"exit status under {limit}", done.returncode, "", note=done.stderr.strip()[:200])
    bench.at_least(f"refused before loading under {limit}", float(said), 1.0)


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[list[str] | None]:
    """A memory cgroup of `limit` bytes; yields the beginning of a command that runs the rest in it, or None."""
    found = (("memory/", "limit_in_bytes"), ("", "max"))  # versions 1 and 2
    folder = Path()
    for hierarchy, name in found:
        folder = Path("/sys/fs/cgroup", hierarchy, f"edgekit-{os.getpid()}")
        with contextlib.suppress(OSError):
            folder.mkdir()
            (folder / f"memory.{name}").write_text(str(limit))
            break
        with contextlib.suppress(OSError):
            folder.rmdir()
    else:
        yield None
        return
    try:
        yield ["bash", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "bash"]
    finally:
        folder.rmdir()


def turns(bench: Benchmark, bundle: Path, quick: bool) -> None:
    """Verdicts of `edgekit compare` with three bundles: one twice, and once slowed down."""
    plain = [sys.executable, "-m", "edgekit.profile.turns"]
    equal: list[tuple[Verdict, ...]] = []
    slowed: list[tuple[Verdict, ...]] = []
    for trial in range(TRIALS):
        contest = take_turns([bundle] * 3, commands=[plain, plain, [*WORK, "slow"]])
        equal.append(contest.against(0, 1))
        slowed.append(contest.against(0, 2))
        print(f"turns {trial + 1}: {_words(equal[-1])}; slowed {_words(slowed[-1])}", file=sys.stderr)
    _count(bench, "in turns", equal, slowed, must_find=True)


def reports(bench: Benchmark, bundle: Path, quick: bool) -> None:
    """The same of profiles, made one after the other: each with the one before, and with one that was slowed down."""
    equal: list[tuple[Verdict, ...]] = []
    slowed: list[tuple[Verdict, ...]] = []
    rows = (f"pp{PROMPT}", f"tg{ANSWER}")
    with tempfile.TemporaryDirectory() as folder:
        before = None
        for trial in range(TRIALS + 1):
            slow = _profile(bundle, Path(folder, "slow.json"), slow=True) if trial else None
            plain = _profile(bundle, Path(folder, "plain.json"))
            if before is not None and slow is not None:
                pairs = [compare(before, other) for other in (plain, slow)]
                same, tenth = (tuple(row for row in pair if row.name in rows) for pair in pairs)
                equal.append(same)
                slowed.append(tenth)
                print(f"reports {trial}: {_words(same)}; slowed {_words(tenth)}", file=sys.stderr)
            before = plain
    # Runs one after the other differ by what the machine did meanwhile: what they miss is told, without a bound.
    _count(bench, "of two profiles", equal, slowed, must_find=False)


def _profile(bundle: Path, output: Path, *, slow: bool = False) -> Report:
    start = [*WORK, "slow-command"] if slow else EDGEKIT
    options = ["--context", str(CONTEXT), "--settle", "0", "--idle", "0", "--no-operators", "--no-cold"]
    _run([*start, "profile", str(bundle), *options, "-o", str(output)])
    return Report.load(output)


def _count(
    bench: Benchmark,
    how: str,
    equal: list[tuple[Verdict, ...]],
    slowed: list[tuple[Verdict, ...]],
    *,
    must_find: bool,
) -> None:
    """Ratios and verdicts of all trials; a trial of equals counts when none of its figures got a verdict."""
    for kind, trials in (("equal", equal), ("a tenth slower", slowed)):
        for figures in zip(*trials, strict=True):
            ratios = [row.ratio or 0.0 for row in figures]
            bench.samples(f"ratio {how}, {kind}, {figures[0].name}", ratios, unit="ratio")
            if kind != "equal":
                told = [row.verdict for row in figures].count("slower")
                name = f"compare {how}, {kind}: 'slower' of {TRIALS}, {figures[0].name}"
                if must_find:
                    bench.at_least(name, told, 0.9 * TRIALS)
                else:
                    bench.value(name, told, "trials")
    told = sum(all(row.verdict == "cannot tell" for row in rows) for rows in equal)
    bench.at_least(f"compare {how}, equal: 'cannot tell' of {TRIALS}, all figures", told, 0.9 * TRIALS)


def _words(rows: tuple[Verdict, ...]) -> str:
    return ", ".join(f"{row.name} {row.verdict} ({row.ratio:.3f})" for row in rows)


def sensors(bench: Benchmark, bundle: Path, quick: bool) -> None:
    options = ["--repeat", "1", "--context", "256", "--no-operators", "--json"]
    rows = {row["name"]: row for row in json.loads(_run([*EDGEKIT, "profile", str(bundle), *options]))["measurements"]}
    energy = rows["energy per generated token"]
    honest = energy["note"].startswith("no sensor") if energy["value"] is None else energy["value"] > 0
    bench.measurements.append(Measurement("energy per generated token", energy["value"], "J", note=energy["note"]))
    bench.at_least("energy is measured, or null with a reason", float(honest), 1.0)


SECTIONS: dict[str, Section] = {
    "stopwatch": stopwatch, "overhead": overhead, "memory": memory, "refusal": refusal, "turns": turns,
    "reports": reports, "sensors": sensors,
}  # fmt: skip


def _make_bundle(folder: Path) -> Path:
    compress(open_model("smollm2-135m"), load_recipe("int4"), folder / "checkpoint")
    export(open_model(str(folder / "checkpoint")), folder / "small", target=find_target(host_target()))
    return folder / "small"


def _run(command: list[str]) -> str:
    """A command's output; what it says against it goes to ours."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions where no bound counts them")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be given several times")
    parser.add_argument("--into", type=Path, help="a file that keeps what has ended, and is taken from there")
    parser.add_argument("--bundle", type=Path, help="measure this one instead of SmolLM2-135M in int4")
    return parser.parse_args()


def _kept(path: Path | None) -> dict[str, tuple[list[Measurement], list[Check]]]:
    """The sections of a file of `_keep`, if this machine made it."""
    if path is None or not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["machine"] != host_device().fingerprint():
        sys.exit(f"{path} is of another machine: {data['machine']}")
    return {
        name: ([Measurement(**row) for row in rows], [Check(**check) for check in checks])
        for name, (rows, checks) in data["sections"].items()
    }


def _keep(path: Path, sections: dict[str, tuple[list[Measurement], list[Check]]]) -> None:
    plain = {name: [[dataclasses.asdict(row) for row in rows] for rows in parts] for name, parts in sections.items()}
    path.write_text(json.dumps({"machine": host_device().fingerprint(), "sections": plain}, indent=1))


if __name__ == "__main__":
    main()
