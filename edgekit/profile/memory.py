"""What memory a process uses, what it used at its peak, and what it may still take. Linux; None where not known.

A mapped weight file is in memory once, however many processes map it, and the kernel may drop it again. RSS counts it
in full for each of them. PSS divides a page by the number of processes that map it, so it adds up over processes; here
it comes in two parts, `private_bytes + file_bytes == pss_bytes` up to 2 kB of rounding.
Source: Linux, Documentation/filesystems/proc.rst, smaps_rollup and status; admin-guide/cgroup-v2.rst and v1/memory.rst.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekit.host import cgroups, memory_limit, read


@dataclass(frozen=True)
class Memory:
    """The memory of one process at one moment, without its children; nothing that is swapped out counts.

    rss_bytes:      all resident pages, shared ones in full
    pss_bytes:      all resident pages, each divided by how many processes map it
    private_bytes:  the part of PSS that no file backs: heap, arena, KV cache, stacks, changed copies of mapped pages,
                    shared memory. The kernel cannot drop it, so a machine must really have it
    file_bytes:     the part of PSS that files back: mapped weights, libraries. When memory is short it is dropped and
                    read again, at the price of speed
    peak_rss_bytes: the highest RSS since the process started, to the page, however short
    """

    rss_bytes: int | None
    pss_bytes: int | None
    private_bytes: int | None
    file_bytes: int | None
    peak_rss_bytes: int | None


def read_memory(root: Path = Path("/"), *, pid: int | None = None) -> Memory:
    """The memory of process `pid`, or of this one.

    All figures are None when the process is gone. RSS and its peak are there on every Linux, PSS since 4.14, its two
    parts since 5.3. Reading walks the page tables: 2 ms for each 100 MB mapped in pages of 4 kB, on a 2024 server.
    """
    process = root / "proc" / ("self" if pid is None else str(pid))
    rollup, status = read(process / "smaps_rollup"), read(process / "status")
    anonymous, shared = _bytes(rollup, "Pss_Anon"), _bytes(rollup, "Pss_Shmem")
    rss = _bytes(rollup, "Rss")
    return Memory(
        rss_bytes=_bytes(status, "VmRSS") if rss is None else rss,
        pss_bytes=_bytes(rollup, "Pss"),
        private_bytes=None if anonymous is None else anonymous + (shared or 0),
        file_bytes=_bytes(rollup, "Pss_File"),
        peak_rss_bytes=_bytes(status, "VmHWM"),
    )


def available_bytes(root: Path = Path("/")) -> int | None:
    """How much more this process may use before the kernel swaps, kills or refuses; None when nothing is known.

    The least of: MemAvailable; for every cgroup from the process's own to the root, versions 2 and 1, its limit minus
    its usage; and RLIMIT_AS minus the address space in use. Usage counts no inactive file pages, as in Kubernetes'
    working set: the kernel gives them up at once, and a container that has read its model once is not full.
    """
    process = root / "proc/self"
    bounds = [_bytes(read(root / "proc/meminfo"), "MemAvailable"), _address_space(process)]
    bounds += [_cgroup_headroom(folder) for folder in cgroups(root, "memory")]
    return min((bound for bound in bounds if bound is not None), default=None)


class PeakMemory:
    """The highest memory while a block ran: `with PeakMemory() as peak: ...`, then `peak.peak_pss_bytes` and so on.

    A thread reads this process's memory up to `hz` times a second, using at most a fiftieth of one core, and the block
    is read at either end. A rise between two readings is missed by the peaks of PSS and its parts; each is the highest
    of its own, so the parts need not add up to the whole. `history` holds every reading with its time.perf_counter.
    The peak of RSS misses nothing when the block sets a new one for the process, for then the kernel's own peak is the
    block's. `n` counts the readings. A figure is None where the system does not tell it. Enter it once.
    """

    def __init__(self, *, hz: float = 10.0, root: Path = Path("/")) -> None:
        self.peak_rss_bytes: int | None = None
        self.peak_pss_bytes: int | None = None
        self.peak_private_bytes: int | None = None
        self.peak_file_bytes: int | None = None
        self.n = 0
        self.history: list[tuple[float, Memory]] = []
        self._root = root
        self._period_s = 1 / hz
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._peak_before: int | None = None

    def __enter__(self) -> Self:
        self._peak_before = self.look().peak_rss_bytes
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        peak = self.look().peak_rss_bytes
        if peak is not None and self._peak_before is not None and peak > self._peak_before:
            self.peak_rss_bytes = _higher(self.peak_rss_bytes, peak)

    def _watch(self) -> None:
        pause_s = self._period_s
        while not self._done.wait(pause_s):
            start = time.perf_counter()
            self.look()
            pause_s = max(self._period_s, 49 * (time.perf_counter() - start))

    def look(self) -> Memory:
        """Read now, also after the block: where a thread beside the timed work would cost it time."""
        now = read_memory(self._root)
        self.history.append((time.perf_counter(), now))
        self.peak_rss_bytes = _higher(self.peak_rss_bytes, now.rss_bytes)
        self.peak_pss_bytes = _higher(self.peak_pss_bytes, now.pss_bytes)
        self.peak_private_bytes = _higher(self.peak_private_bytes, now.private_bytes)
        self.peak_file_bytes = _higher(self.peak_file_bytes, now.file_bytes)
        self.n += 1
        return now


@dataclass(frozen=True)
class Faults:
    """Page faults of this process so far: `minor` found their page in memory, `major` had to read it from storage."""

    minor: int
    major: int


def read_faults() -> Faults:
    """The page faults of this process."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Faults(usage.ru_minflt, usage.ru_majflt)


def mapped_bytes(root: Path = Path("/")) -> dict[str, int]:
    """PSS of this process by what backs it: each file's path, `[heap]` and the like, "" for anonymous memory.

    Empty where the system does not tell. It walks every mapping: milliseconds.
    """
    sizes: dict[str, int] = {}
    name = ""
    for line in read(root / "proc/self/smaps").splitlines():
        if found := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line):
            name = found[1]
        elif found := re.match(r"Pss: +(\d+) kB", line):
            sizes[name] = sizes.get(name, 0) + int(found[1]) * 1024
    return sizes


def _higher(a: int | None, b: int | None) -> int | None:
    return max((number for number in (a, b) if number is not None), default=None)


def _bytes(text: str, key: str) -> int | None:
    """The value of the line `key:  123 kB`, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _address_space(process: Path) -> int | None:
    limit = re.search(r"^Max address space\s+(\d+)", read(process / "limits"), re.MULTILINE)
    used = _bytes(read(process / "status"), "VmSize")
    return max(0, int(limit[1]) - used) if limit and used is not None else None


def _cgroup_headroom(folder: Path) -> int | None:
    limit = memory_limit(folder)
    usage = (read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")).strip()
    if limit is None or not usage.isdecimal():
        return None
    # total_inactive_file is version 1's figure with the groups below it, which version 2 always counts.
    stat = dict(line.split() for line in read(folder / "memory.stat").splitlines() if line.count(" ") == 1)
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return max(0, limit - max(0, int(usage) - cache))
