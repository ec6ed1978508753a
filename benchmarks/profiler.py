"""Whether the profiler is right: against a stopwatch, its own cost, its predictions, and its verdicts on two runs.

    stopwatch     a process does what llama-bench does (prefill 512, decode 128) and writes a mark before and after
                  each; another process takes the time at the marks. `edgekit profile` must agree within 3%
    overhead      the same work with the sensor's log and the reading of memory, and without, in turns: under 1%
    memory        predicted over the measured peak of PSS, the context full, each in a process of its own
    refusal       under a limit of address space that is too small, it must end with exit 4 before it loads
    compare       two bundles in turns, equal, and one of them slowed down by 10% with a wait; and two profiles of one
                  bundle, one after the other
    no sensor     where the machine has none: null with a reason, and exit 0

It needs no peer, and a machine that does nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from common import Benchmark, arguments

from edgekit.compress import compress
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.model.sources import open_model
from edgekit.profile.compare import compare
from edgekit.profile.turns import take_turns
from edgekit.recipe import load_recipe
from edgekit.report import Report

PROMPT, ANSWER, CONTEXT = 512, 128, 1024


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("profiler")
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "small"
        compress(open_model("smollm2-135m"), load_recipe("int4"), Path(folder) / "checkpoint")
        export(open_model(str(Path(folder) / "checkpoint")), bundle, target=find_target(host_target()))
        stopwatch(bench, bundle, blocks=6 if options.quick else 10)
        overhead(bench, bundle, turns=8 if options.quick else 16)
        memory(bench, bundle)
        refusal(bench, bundle)
        verdicts(bench, bundle, Path(folder), trials=10)
        no_sensor(bench, bundle)
    bench.finish(as_json=options.json)


def stopwatch(bench: Benchmark, bundle: Path, *, blocks: int) -> None:
    """Our figures of one repetition beside those of a clock in another process, over the same spans."""
    off: dict[str, list[float]] = {"prefill": [], "decode": []}
    child = subprocess.Popen(
        [sys.executable, __file__, "work", str(bundle)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    for block in range(blocks + 1):
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


def work(bundle: str) -> None:
    """The child of `stopwatch`: llama-bench's two tests through the profiler's own functions, with marks around."""
    from edgekit.profile import latency
    from edgekit.runtime.session import Session

    session = Session.open(bundle, context=CONTEXT)
    engine = session.engine
    for line in sys.stdin:
        seed = int(line)
        ids = list(range(seed, seed + PROMPT))
        engine.rewind(0)
        print("begin prefill", flush=True)
        clock = time.perf_counter()
        engine.forward(ids)
        prefill = time.perf_counter() - clock
        print("end prefill", flush=True)
        print("begin decode", flush=True)
        (begin, end), _ = latency.generate(engine, ids[0], ANSWER)
        print("end decode", flush=True)
        print(json.dumps({"prefill": prefill, "decode": end - begin}), flush=True)


def overhead(bench: Benchmark, bundle: Path, *, turns: int) -> None:
    """Decode and prefill as a plain loop, and as the profiler does them with a sensor's log running, in turns."""
    done = subprocess.run(
        [sys.executable, __file__, "overhead", str(bundle), str(turns)], capture_output=True, text=True, check=True
    )
    for phase, (bare, watched) in json.loads(done.stdout).items():
        cost = 100 * (min(watched) / min(bare) - 1)
        bench.value(f"overhead, {phase}", cost, "%", n=len(bare), note="best of all turns over best, either way")
        bench.at_most(f"overhead, {phase}, %", cost, 1.0)


def measure_overhead(bundle: str, turns: str) -> None:
    """Seconds of the plain way and of the profiled one; the order alternates, and other programs only add time."""
    import numpy as np

    from edgekit.profile import latency
    from edgekit.profile.power import PowerLog, Source
    from edgekit.runtime.session import Session

    session = Session.open(bundle, context=CONTEXT)
    engine = session.engine
    file = Path("/proc/self/stat")  # as costly to read as a file of a sensor
    source = Source("none", ("none",), "", lambda: (float(len(file.read_text())),))

    def plain(seed: int) -> dict[str, float]:
        ids = np.random.default_rng(seed).integers(0, engine.spec.vocabulary, PROMPT).tolist()
        engine.rewind(0)
        clock = time.perf_counter()
        engine.forward(ids)
        prefill = time.perf_counter() - clock
        engine.rewind(0)
        token = ids[0]
        clock = time.perf_counter()
        for _ in range(ANSWER):
            token = int(engine.forward([token])[-1].argmax())
        return {"prefill": prefill, "decode": time.perf_counter() - clock}

    def profiled(seed: int) -> dict[str, float]:
        with PowerLog(source):
            done = latency.repeat(session, PROMPT, ANSWER, seed=seed)
        return {"prefill": done.prefill[1] - done.prefill[0], "decode": done.decode[1] - done.decode[0]}

    times: dict[str, tuple[list[float], list[float]]] = {"prefill": ([], []), "decode": ([], [])}
    for turn in range(2 * int(turns) + 1):
        for way in (0, 1) if turn % 2 else (1, 0):
            found = (plain, profiled)[way](turn)
            for phase, ways in times.items() if turn else ():
                ways[way].append(found[phase])
    print(json.dumps(times))


def memory(bench: Benchmark, bundle: Path) -> None:
    for context in (512, 4096, 8192):
        code = subprocess.run(
            [sys.executable, __file__, "memory", str(bundle), str(context)], capture_output=True, text=True, check=True
        )
        predicted, measured = json.loads(code.stdout)
        bench.value(f"peak PSS, context {context} full", measured / 1e6, "MB")
        bench.value(f"memory predicted, context {context}", predicted / 1e6, "MB")
        bench.at_most(f"memory predicted, context {context}: off by, %", 100 * abs(predicted / measured - 1), 10.0)


def measure_memory(bundle: str, context: str) -> None:
    """Fill the context, and print what was predicted and what the peak of PSS was, in bytes."""
    from edgekit.profile.latency import fill
    from edgekit.profile.memory import PeakMemory
    from edgekit.runtime.session import Session

    with PeakMemory(hz=50) as peak:
        session = Session.open(bundle, context=int(context))
        fill(session.engine, int(context) - 8)
        for _ in range(8):
            session.engine.forward([3])
    print(json.dumps([session.memory.total_bytes, peak.peak_pss_bytes]))


def refusal(bench: Benchmark, bundle: Path) -> None:
    """With less address space than the model needs, the command must end with exit 4 and the numbers."""
    start = f"{sys.executable} -c 'from edgekit.cli.main import main; main()'"
    command = f"ulimit -v 900000; exec {start} profile {bundle} --settle 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    said = done.returncode == 4 and "must fit in memory" in done.stderr
    bench.value("exit status under a limit of address space", done.returncode, "", note=done.stderr.strip()[:200])
    bench.at_least("refused before loading under a limit of address space", float(said), 1.0)


def verdicts(bench: Benchmark, bundle: Path, folder: Path, *, trials: int) -> None:
    """Verdicts on decode and prefill: in turns for equal bundles and a planted slowdown, and of two profiles."""
    plain = [sys.executable, "-m", "edgekit.profile.turns"]
    slow = [sys.executable, __file__, "slow"]
    for name, starts, word in (("equal", [plain, plain], "cannot tell"), ("10% slower", [plain, slow], "slower")):
        told: dict[str, list[str]] = {"prefill": [], "decode": []}
        ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
        for _ in range(trials):
            contest = take_turns([bundle, bundle], commands=starts)
            for row in contest.against(0, 1):
                if row.name in told:
                    told[row.name].append(row.verdict)
                    ratios[row.name].append(row.ratio or 0.0)
        for phase, words in told.items():
            bench.samples(f"ratio in turns, {name}, {phase}", ratios[phase], unit="ratio")
            bench.at_least(f"compare in turns, {name}: {word!r} of {trials}, {phase}", words.count(word), 0.9 * trials)
    reports = [profile_once(bundle, folder / f"{index}.json") for index in range(trials + 1)]
    for test in (f"pp{PROMPT}", f"tg{ANSWER}"):
        found = [{row.name: row.verdict for row in compare(a, b)}[test] for a, b in pairwise(reports)]
        medians = [statistics.median(report.samples[test]) for report in reports]
        bench.samples(f"{test} of {len(reports)} profiles of one bundle", medians, unit="tok/s")
        count = found.count("cannot tell")
        bench.at_least(f"compare of two profiles: 'cannot tell' of {trials}, {test}", count, 0.9 * trials)


def profile_once(bundle: Path, output: Path) -> Report:
    words = ["profile", str(bundle), "--context", str(CONTEXT), "--no-operators", "--repeat", "8", "-o", str(output)]
    _edgekit(*words)
    return Report.load(output)


def no_sensor(bench: Benchmark, bundle: Path) -> None:
    done = _edgekit("profile", str(bundle), "--repeat", "1", "--context", "256", "--no-operators", "--json")
    rows = {row["name"]: row for row in json.loads(done)["measurements"]}
    energy = rows["energy per generated token"]
    honest = energy["note"].startswith("no sensor") if energy["value"] is None else energy["value"] > 0
    bench.at_least("energy is measured, or null with a reason", float(honest), 1.0)


def _edgekit(*words: str) -> str:
    code = "from edgekit.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout


def serve_slowly(*words: str) -> None:
    """A process of a bundle that waits a tenth of each pass's time after it."""
    from edgekit.profile import turns
    from edgekit.runtime.engine import Engine

    forward = Engine.forward

    def slowed(engine: Engine, ids, *, keep=1):  # type: ignore[no-untyped-def]
        clock = time.perf_counter()
        logits = forward(engine, ids, keep=keep)
        until = clock + 1.1 * (time.perf_counter() - clock)
        while time.perf_counter() < until:
            pass
        return logits

    Engine.forward = slowed  # type: ignore[method-assign]
    turns.main(words)


CHILDREN = {"work": work, "overhead": measure_overhead, "memory": measure_memory, "slow": serve_slowly}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](*sys.argv[2:])
    else:
        main()
