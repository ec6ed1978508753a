"""Two bundles or more against each other on one machine, in turns: what shifts the machine shifts all of them.

A block starts a process for each bundle, and then lets them answer in turn, there and back (a b b a, from the other end
in every second block), so that a machine that becomes slower or faster at a steady rate favours none. Processes are new
in each block, for where a process lands in memory is luck that stays with it. While one bundle works the others wait on
their standard input; the one whose turn it is works for a moment before it is timed, because after a pause it is slow.

One way there and back gives a ratio of two bundles, the median of a block's ratios is the block's, and a signed rank
test over the blocks gives the verdict: if the bundles are equal, each block's ratio is as likely below 1 as above it,
whatever the noise looks like, so the test's level is exact. Rates of decoding are those of the median gap in a turn;
what makes only some tokens slow is not seen here: look at the percentiles of a profile for that.
Source: T. Kalibera and R. Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013, for levels of repetition.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import DeviceError, UserError
from edgekit.profile.compare import LEAST_PAIRS, Pairs, Verdict, judge_pairs
from edgekit.profile.latency import generate, prefill, wake
from edgekit.runtime.session import Session

BLOCKS, TURNS = 12, 2
PROMPT, ANSWER = 128, 16
FIGURES = ("prefill", "decode")  # both in tokens a second

Block = tuple[float, ...]  # of one bundle: there, back, there, back ...


@dataclass(frozen=True)
class Contest:
    """Blocks by bundle and figure; `against(0, 1)` judges the second bundle against the first."""

    names: tuple[str, ...]
    samples: tuple[dict[str, tuple[Block, ...]], ...]

    def against(self, a: int, b: int) -> tuple[Verdict, ...]:
        """Verdicts for each figure."""
        return judge_pairs([self._pairs(name, self.samples[a][name], self.samples[b][name]) for name in FIGURES])

    @staticmethod
    def _pairs(name: str, a: tuple[Block, ...], b: tuple[Block, ...]) -> Pairs:
        ratios = tuple(block_ratio(*blocks) for blocks in zip(a, b, strict=True))
        before, after = (statistics.median(rate for block in blocks for rate in block) for blocks in (a, b))
        return Pairs(name, "tok/s", before, after, ratios)


def block_ratio(a: Block, b: Block) -> float:
    """b over a: the median of their ways there and back, of which each is a geometric mean."""
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    return math.exp(statistics.median((there + back) / 2 for there, back in zip(logs[::2], logs[1::2], strict=True)))


def take_turns(
    paths: Sequence[Path],
    *,
    prompt_tokens: int | None = None,
    generate_tokens: int | None = None,
    threads: int | None = None,
    blocks: int = BLOCKS,
    turns: int = TURNS,
    commands: Sequence[Sequence[str]] | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Contest:
    """Measure the bundles in turns. `commands` replace how a bundle's process is started (its own arguments follow).

    Raises UserError: fewer than two bundles or seven blocks, or no bundle; DeviceError: a process ended.
    """
    if len(paths) < 2:
        raise UserError(f"turns need two bundles or more: got {len(paths)}")
    if blocks < LEAST_PAIRS or turns < 1:
        raise UserError(f"--blocks must be at least {LEAST_PAIRS}: got {blocks}")
    shortest = min(Bundle.open(path).spec.context_length for path in paths)
    prompt = prompt_tokens or min(PROMPT, shortest // 4 or 1)
    answer = generate_tokens or min(ANSWER, shortest // 4 or 1)
    if prompt + 1 > shortest or answer + 1 > shortest or min(prompt, answer) < 1:
        raise UserError(f"--prompt and --generate must be from 1 to {shortest - 1}: got {prompt} and {answer}")
    context = min(shortest, max(prompt, answer) + 64)
    starts = commands or [[sys.executable, "-m", "edgekit.profile.turns"]] * len(paths)
    samples: list[dict[str, list[Block]]] = [{name: [] for name in FIGURES} for _ in paths]
    for block in range(blocks):
        on_block(block, blocks)
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(_Worker([*start, str(path), str(context), str(threads or 0)]))
                for start, path in zip(starts, paths, strict=True)
            ]
            there = [*range(len(paths))][:: -1 if block % 2 else 1]
            found: list[dict[str, list[float]]] = [{name: [] for name in FIGURES} for _ in paths]
            for turn in range(-1, turns):  # the first one warms up
                for index in there if turn < 0 else [*there, *reversed(there)]:
                    rates = workers[index].ask(prompt, answer, seed=block * (turns + 1) + turn + 1)
                    for name, rate in zip(FIGURES, rates, strict=True) if turn >= 0 else ():
                        found[index][name].append(rate)
        for index, rates_of in enumerate(found):
            for name, values in rates_of.items():
                samples[index][name].append(tuple(values))
    on_block(blocks, blocks)
    return Contest(
        tuple(path.resolve().name for path in paths),
        tuple({name: tuple(values) for name, values in one.items()} for one in samples),
    )


class _Worker:
    """A process that holds one bundle and answers one request a line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603  this interpreter
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()

    def ask(self, prompt: int, answer: int, *, seed: int) -> list[float]:
        """Tokens a second of prefill and decode."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([prompt, answer, seed]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            last = said.strip().splitlines()[-1:] or ["without a word"]
            raise DeviceError(f"the process of a bundle ended: {last[0][:300]}")
        rates = json.loads(line)
        assert isinstance(rates, list)
        return [float(rate) for rate in rates]


def serve(path: Path, *, context: int, threads: int | None, requests: Iterator[str]) -> Iterator[str]:
    """Answer requests for one bundle: the loop of a worker's process."""
    session = Session.open(path, context=context, threads=threads)
    for line in requests:
        prompt, answer, seed = (int(number) for number in json.loads(line))
        ids = np.random.default_rng(seed).integers(0, session.bundle.spec.vocabulary, prompt).tolist()
        wake(session.engine)
        begin, end = prefill(session.engine, ids)
        _, gaps = generate(session.engine, ids[0], answer)
        yield json.dumps([prompt / (end - begin), 1 / statistics.median(gaps)])


def main(words: Sequence[str]) -> None:
    """`python -m edgekit.profile.turns BUNDLE CONTEXT THREADS`, requests on standard input."""
    path, context, threads = words
    for answer in serve(Path(path), context=int(context), threads=int(threads) or None, requests=iter(sys.stdin)):
        print(answer, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
