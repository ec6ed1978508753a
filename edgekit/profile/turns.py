"""Two bundles or more against each other on one machine, in turns: what shifts the machine shifts all of them.

A block starts a process for each bundle, lets them warm up, and then lets them answer in turn, in an order that
reverses from turn to turn (a b b a). Processes are new in each block, for where a process lands in memory is luck that
stays with it. Turns are short, and a block gives one number a bundle and figure: its best turn, because other programs
only ever add time. Blocks are paired, and a signed rank test over them gives the verdict. While one bundle works the
others wait on their standard input, without spinning threads. What makes only some turns slow is not seen here: look at
the percentiles of a profile for that.
Sources: T. Kalibera and R. Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013, for levels of repetition;
J. Chen and J. Revels, Robust benchmarking in noisy environments, arXiv:1608.04295, for the best instead of the median.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekit.bundle import MODEL, Bundle
from edgekit.errors import DeviceError, UserError
from edgekit.profile.compare import LEAST_PAIRS, Verdict, judge_pairs
from edgekit.profile.latency import repeat
from edgekit.runtime.session import Session

BLOCKS, TURNS = 8, 5
PROMPT, ANSWER = 128, 32
FIGURES = ("prefill", "decode", "time to first token")
_UNITS = {"prefill": "tok/s", "decode": "tok/s", "time to first token": "ms"}


@dataclass(frozen=True)
class Contest:
    """Samples by bundle and figure, one a block; `against(0, 1)` judges the second against the first."""

    names: tuple[str, ...]
    samples: tuple[dict[str, tuple[float, ...]], ...]

    def against(self, a: int, b: int) -> tuple[Verdict, ...]:
        """Verdicts for each figure."""
        return tuple(judge_pairs(name, _UNITS[name], self.samples[a][name], self.samples[b][name]) for name in FIGURES)


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

    Raises UserError: fewer than two bundles or six blocks, or no bundle; DeviceError: a process ended.
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
    samples: list[dict[str, list[float]]] = [{name: [] for name in FIGURES} for _ in paths]
    for block in range(blocks):
        on_block(block, blocks)
        with contextlib.ExitStack() as stack:
            order = list(range(len(paths)))
            if block % 2:
                order.reverse()
            workers: dict[int, _Worker] = {}
            for index in order:
                words = [*starts[index], str(paths[index]), str(context), str(threads or 0)]
                workers[index] = stack.enter_context(_Worker(words))
            found: list[dict[str, list[float]]] = [{name: [] for name in FIGURES} for _ in paths]
            for turn in range(turns + 1):
                for index in order if turn % 2 == 0 else reversed(order):
                    figures = workers[index].ask(prompt, answer, seed=block * (turns + 1) + turn)
                    for name, value in zip(FIGURES, figures, strict=True) if turn else ():
                        found[index][name].append(value)
        for index, figures_of in enumerate(found):
            for name, values in figures_of.items():
                samples[index][name].append((min if _UNITS[name] == "ms" else max)(values))
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
        """Tokens a second of prefill and decode, and milliseconds to the first token."""
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
        figures = json.loads(line)
        assert isinstance(figures, list)
        return [float(figure) for figure in figures]


def serve(path: Path, *, context: int, threads: int | None, requests: Iterator[str]) -> Iterator[str]:
    """Answer requests for one bundle: the loop of a worker's process."""
    session = Session.open(path, context=context, threads=threads)
    for line in requests:
        prompt, answer, seed = (int(number) for number in json.loads(line))
        done = repeat(session, prompt, answer, seed=seed)
        prefill, decode = (end - begin for begin, end in (done.prefill, done.decode))
        yield json.dumps([prompt / prefill, answer / decode, 1e3 * done.first.first_token])


def main(words: Sequence[str]) -> None:
    """`python -m edgekit.profile.turns BUNDLE CONTEXT THREADS`, requests on standard input."""
    path, context, threads = words
    for answer in serve(Path(path), context=int(context), threads=int(threads) or None, requests=iter(sys.stdin)):
        print(answer, flush=True)


def is_bundle(path: Path) -> bool:
    """Whether a path is a folder with a model in it, rather than a report."""
    return (path / MODEL).is_file()


if __name__ == "__main__":
    main(sys.argv[1:])
