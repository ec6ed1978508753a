"""How fast the machine itself is at the moment: two loops that no model changes.

On a shared or hot machine everything becomes slower at once. Reading the weights' file once in a plain loop, and
exponentials of numbers that lie in the first cache, take milliseconds beside each repetition; when a later run differs
and these differ with it, it was the machine (`edgekit.profile.compare` looks at them). The reading loop is also the
roofline's bandwidth.
Source: S. Williams, A. Waterman and D. Patterson, Roofline, CACM 52(4), 2009; J. McCalpin, STREAM.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgekit.kernels import library

MOST_BYTES = 1 << 28
_NUMBERS, _ROUNDS = 4096, 300  # 16 kB, a millisecond or two of one core
READING, COMPUTING = "machine: reading memory", "machine: computing"


class Pace:
    """Measures reading, with `threads` threads, and computing, with one. A context manager: it holds threads and a map.

    The file's pages are those that the runtime has mapped too, so that a big model is not in memory twice; a file
    below 32 MB would stay in the processor's caches, and a buffer of that size is read instead.
    """

    def __init__(self, weights: Path, *, threads: int) -> None:
        size = min(weights.stat().st_size, MOST_BYTES) // 4096 * 4096
        self.from_file = size >= 1 << 25
        if self.from_file:
            self._data: NDArray[np.uint8] = np.memmap(weights, np.uint8, "r", shape=(size,))
        else:
            self._data = np.ones(1 << 25, np.uint8)
        self.native = library.library_path() is not None
        edges = np.linspace(0, len(self._data) // 64, threads + 1).astype(np.intp) * 64
        self._parts = [self._data[start:end] for start, end in pairwise(edges)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pace")
        self._numbers = np.linspace(-1, 1, _NUMBERS, dtype=np.float32)
        self._results = np.empty_like(self._numbers)

    def __enter__(self) -> Self:
        self.reading_gbs()
        self.computing_gops()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def reading_gbs(self, passes: int = 3) -> float:
        """Gigabytes a second from memory, the best of so many passes."""
        read = library.read_memory if self.native else _read
        best = 0.0
        for _ in range(passes):
            clock = time.perf_counter()
            list(self._pool.map(read, self._parts))
            best = max(best, self._data.nbytes / (time.perf_counter() - clock) / 1e9)
        return best

    def computing_gops(self, passes: int = 3) -> float:
        """Billions of float32 exponentials a second on one core, the best of so many passes."""
        best = 0.0
        for _ in range(passes):
            clock = time.perf_counter()
            for _ in range(_ROUNDS):
                np.exp(self._numbers, out=self._results)
            best = max(best, _ROUNDS * _NUMBERS / (time.perf_counter() - clock) / 1e9)
        return best


def _read(part: NDArray[np.uint8]) -> int:
    """One pass without the kernels: NumPy's sum over words of 8 bytes."""
    return int(part.view(np.uint64).sum())
