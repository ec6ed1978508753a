"""Memory for a cache: pages that are taken as they are first written, and joined to huge ones where most of them are.

NumPy would ask for huge pages at once, and then the first token of each head would take 2 MB: the whole cache. But a
token that attends to positions anywhere in a long cache waits for the tables of small pages: at 32,768 tokens of
SmolLM2-135M a fifteenth of a step. So a huge page takes the place of the small ones when half of them are in use, which
never takes more than twice what is used, nor more than the cache.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python does not name


@functools.cache
def huge_bytes() -> int:
    """How large huge pages are: 2 MB where small ones have 4 kB, 32 MB where they have 16; 0 where there are none."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


class LazyPages:
    """Zeros of a shape (1, rows, n, ...) that take no memory until they are written: `array`.

    Raises MemoryError when the system has no room for them.
    """

    def __init__(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> None:
        try:
            size = math.prod(shape) * kind.itemsize
            self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as problem:
            raise MemoryError(str(problem)) from problem
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without huge pages
                self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: NDArray[Any] = np.frombuffer(self._pages, kind).reshape(shape)
        self._joined: set[int] = set()  # where huge pages begin

    def join(self, extent: int) -> int:
        """Make huge pages of what is mostly used, if the first `extent` of the n are in every row.

        Returns how many are new: none where the system has no such pages.
        """
        huge = huge_bytes()
        if huge == 0:
            return 0
        rows, n = self.array.shape[1:3]
        row_bytes = self.array.nbytes // rows
        used = row_bytes * extent // n
        first = -self.array.ctypes.data % huge
        new = 0
        for begin in range(first, self.array.nbytes - huge + 1, huge):
            if begin in self._joined:
                continue
            end = begin + huge
            overlaps = (
                min(end, row * row_bytes + used) - max(begin, row * row_bytes)
                for row in range(begin // row_bytes, (end - 1) // row_bytes + 1)
            )
            if 2 * sum(max(0, overlap) for overlap in overlaps) < huge:
                continue
            self._joined.add(begin)
            with contextlib.suppress(OSError, AttributeError):
                self._pages.madvise(mmap.MADV_HUGEPAGE, begin, huge)
                self._pages.madvise(COLLAPSE, begin, huge)
                new += 1
        return new
