"""The processes of `benchmarks/profiler.py`: each does some work and tells its parent about it on standard output.

marks BUNDLE PROMPT ANSWER CONTEXT   a line of input each: prefill and decode with marks around, then our own times
overhead BUNDLE ROUNDS TIMES         seconds of prefill and decode: plain, profiled, with the sensor read more often
memory BUNDLE CONTEXT                predicted and measured bytes with the context full
slow ...                             a process of `edgekit.profile.turns`, a tenth slower
slow-command ...                     the command `edgekit ...`, a tenth slower
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from edgekit.bundle import WEIGHTS
from edgekit.profile import latency
from edgekit.profile.memory import PeakMemory
from edgekit.profile.pace import Pace
from edgekit.profile.power import PowerLog, Source
from edgekit.runtime.engine import Engine
from edgekit.runtime.session import Session

Seconds = dict[str, float]


def marks(bundle: str, prompt: str, answer: str, context: str) -> None:
    """llama-bench's two tests through the profiler's own functions, a mark before and after each."""
    engine = Session.open(bundle, context=int(context)).engine
    for line in sys.stdin:
        ids = list(range(int(line), int(line) + int(prompt)))
        latency.wake(engine)
        print("begin prefill", flush=True)
        begin, end = latency.prefill(engine, ids)
        print("end prefill", flush=True)
        print("begin decode", flush=True)
        (start, stop), _ = latency.generate(engine, ids[0], int(answer))
        print("end decode", flush=True)
        print(json.dumps({"prefill": end - begin, "decode": stop - start}), flush=True)


def overhead(bundle: str, rounds: str, times: str) -> None:
    """There and back each round: plain, profiled, often, often, profiled, plain. All are woken before."""
    prompt, answer = 256, 48
    engine = Session.open(bundle, context=prompt + 64).engine
    file = Path("/proc/self/stat")  # as costly to read as a file of a sensor
    source = Source("none", ("none",), "", lambda: (float(len(file.read_text())),))
    peak = PeakMemory()

    def plain(ids: list[int]) -> Seconds:
        latency.wake(engine)
        engine.rewind(0)
        clock = time.perf_counter()
        engine.forward(ids)
        prefill = time.perf_counter() - clock
        engine.rewind(0)
        token = ids[0]
        clock = time.perf_counter()
        for _ in range(answer):
            token = int(engine.forward([token])[-1].argmax())
        return {"prefill": prefill, "decode": time.perf_counter() - clock}

    def profiled(ids: list[int], hz: float = PowerLog.hz) -> Seconds:
        with PowerLog(source, hz=hz):
            pace.reading_gbs()
            pace.computing_gops()
            latency.wake(engine)
            read = latency.prefill(engine, ids)
            written, _ = latency.generate(engine, ids[0], answer)
            peak.look()
        return {"prefill": read[1] - read[0], "decode": written[1] - written[0]}

    ways = (plain, profiled, lambda ids: profiled(ids, hz=int(times) * PowerLog.hz))
    found: dict[str, list[list[float]]] = {"prefill": [[], [], []], "decode": [[], [], []]}
    random = np.random.default_rng(0)
    with Pace(Path(bundle, WEIGHTS), threads=engine.threads) as pace:
        for turn in range(-1, int(rounds)):
            for way in (0, 1, 2, 2, 1, 0) if turn % 2 else (2, 1, 0, 0, 1, 2):
                seconds = ways[way](random.integers(0, engine.spec.vocabulary, prompt).tolist())
                for phase, columns in found.items() if turn >= 0 else ():
                    columns[way].append(seconds[phase])
    print(json.dumps(found))


def memory(bundle: str, context: str) -> None:
    """PSS divides the pages of libraries by how many processes map them; RSS is what PSS is where only one does."""
    with PeakMemory(hz=50) as peak:
        session = Session.open(bundle, context=int(context))
        latency.fill(session.engine, int(context) - 8)
        for _ in range(8):
            session.engine.forward([3])
    print(json.dumps([session.memory.total_bytes, peak.peak_rss_bytes]))


def slow(*words: str) -> None:
    from edgekit.profile import turns

    slow_down()
    turns.main(words)


def slow_command(*words: str) -> None:
    from edgekit.cli.main import main

    slow_down()
    sys.argv[1:] = words
    main()


def slow_down() -> None:
    """Let each pass wait for a tenth of its own time."""
    forward = Engine.forward

    def slowed(engine: Engine, ids, *, keep=1):  # type: ignore[no-untyped-def]
        clock = time.perf_counter()
        logits = forward(engine, ids, keep=keep)
        until = clock + 1.1 * (time.perf_counter() - clock)
        while time.perf_counter() < until:
            pass
        return logits

    Engine.forward = slowed  # type: ignore[method-assign]


COMMANDS = {"marks": marks, "overhead": overhead, "memory": memory, "slow": slow, "slow-command": slow_command}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
