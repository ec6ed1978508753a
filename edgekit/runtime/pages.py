"""Memory for a cache: pages that are taken as they are first written, and huge ones where most of them are used.

NumPy would ask for huge pages at once, and then the first token of each head would take 2 MB: the whole cache. But
whoever reads positions anywhere in a long cache waits for the tables of small pages: reading in order is a third slower
from them, too. So a huge page takes the place of the small ones when half of them are in use, which never takes more
than twice what is used.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from collections.abc import Mapping
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
    """Zeros that take no memory until they are written: `arrays` of shapes (1, rows, n, ...), by name.

    They stand side by side, so that small ones share huge pages. Raises MemoryError when the system has no room.
    """

    def __init__(self, parts: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        bytes_of = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in parts.items()}
        self._places, size = {}, 0
        for name, count in bytes_of.items():
            self._places[name] = size
            size += -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        huge = huge_bytes()
        self._size = -(-size // huge) * huge if huge else size
        try:
            self._pages = mmap.mmap(-1, self._size + max(huge, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as problem:
            raise MemoryError(str(problem)) from problem
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without huge pages
                self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        everything = np.frombuffer(self._pages, np.uint8)
        self._first = -everything.ctypes.data % huge if huge else 0  # where whole huge pages begin
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, (shape, kind) in parts.items():
            begin = self._first + self._places[name]
            self.arrays[name] = everything[begin : begin + bytes_of[name]].view(kind).reshape(shape)
        self._joined = np.zeros(self._size // huge if huge else 0, bool)

    def join(self, extents: Mapping[str, int]) -> int:
        """Make huge pages of what is mostly used, if the first `extents` of the n are, in every row of each array.

        Returns how many are new: none where the system has no such pages.
        """
        huge = huge_bytes()
        if huge == 0:
            return 0
        edges, used = [0], [0]
        for name, place in self._places.items():
            array = self.arrays[name]
            rows, n = array.shape[1:3]
            row_bytes = array.nbytes // rows
            for row in range(rows):
                begin, count = place + row * row_bytes, row_bytes * extents[name] // n
                edges += [begin, begin + count]
                used += [used[-1], used[-1] + count]
        windows = np.arange(len(self._joined) + 1) * huge
        wanted = 2 * np.diff(np.interp(windows, edges, used)) >= huge
        new = np.flatnonzero(wanted & ~self._joined)
        self._joined[new] = True
        for window in new:
            begin = self._first + int(window) * huge
            with contextlib.suppress(OSError, AttributeError):
                self._pages.madvise(mmap.MADV_HUGEPAGE, begin, huge)
                self._pages.madvise(COLLAPSE, begin, huge)  # not where nothing was written yet
        return len(new)

    def release(self, name: str) -> None:
        """Give the memory of an array back; it is all zeros then."""
        count = -(-self.arrays[name].nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_DONTNEED, self._first + self._places[name], count)
