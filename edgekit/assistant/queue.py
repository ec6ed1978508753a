"""One model, many requests: a thread runs one job after the other, the rest wait in a line of bounded length.

    line = Line(waiting=32)
    job = line.submit(lambda job: events(), seconds=120)  # raises Full at once when the line is
    async for event in job: ...
    job.cancel()                                       # also what happens when nobody reads it any more

A job is an iterator that the thread runs; its items go to the coroutine that reads the job, and are kept for it as long
as it is slow: an answer has a bounded length, so nobody waits for a slow reader and memory stays bounded. A job ends
when it is done, cancelled (`job.wanted()` is what the work asks on its way), or over its time, which counts from its
first moment in the thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Self, TypeVar

from edgekit.errors import EdgekitError

T = TypeVar("T")


class Full(EdgekitError):
    """The line is full. `retry_after_s` is when there may be room."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"the server answers one request at a time and {waiting} wait; try again in {retry_after_s} s")


class Job(Generic[T]):
    """A piece of work in the line, and its results. Iterate over it once, in the loop that submitted it."""

    def __init__(self, work: Callable[[Job[T]], Iterator[T]], *, seconds: float) -> None:
        self.work = work
        self.seconds = seconds
        self.late = False  # whether it was ended because its time was over
        self.submitted = time.monotonic()
        self.began: float | None = None
        self._cancelled = False
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def cancel(self) -> None:
        """End it as soon as the work asks; before its turn it is not begun. Any thread may do so, at any time."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def wanted(self) -> bool:
        """Whether the work shall go on: what it asks between its steps."""
        if not self.late and self.began is not None and time.monotonic() - self.began > self.seconds:
            self.late = True
        return not (self._cancelled or self.late)

    def put(self, kind: str, value: object = None) -> None:
        """Give the reader a result, or how the job ended."""
        try:
            self._loop.call_soon_threadsafe(self._results.put_nowait, (kind, value))
        except RuntimeError:  # the loop has ended, and with it whoever read
            self._cancelled = True

    async def __aiter__(self) -> AsyncIterator[T]:
        """Its items as they come. Raises what the work raised; leaving the iteration cancels the job."""
        try:
            while True:
                kind, value = await self._results.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            self.cancel()


class Line:
    """The thread and those who wait for it. `waiting` is how many may wait beside the one that runs."""

    def __init__(self, *, waiting: int) -> None:
        assert waiting >= 0
        self.limit = waiting
        self.done = 0
        self.refused = 0
        self._jobs: deque[Job[Any]] = deque()
        self._running: Job[Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._mean_s = 5.0  # of the latest jobs
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job[T]], Iterator[T]], *, seconds: float) -> Job[T]:
        """Put work in the line; `work(job)` makes the iterator, in the thread. Raises Full."""
        job = Job(work, seconds=seconds)
        with self._changed:
            for gone in [waiting for waiting in self._jobs if waiting.cancelled]:
                self._jobs.remove(gone)
                gone.put("end")
            busy = self._running is not None
            if len(self._jobs) >= self.limit + (not busy):
                self.refused += 1
                raise Full(len(self._jobs), max(1, min(60, round(self._mean_s * (len(self._jobs) + busy)))))
            self._jobs.append(job)
            self._changed.notify()
        return job

    @property
    def waiting(self) -> int:
        """How many wait."""
        with self._changed:
            return sum(not job.cancelled for job in self._jobs)

    @property
    def busy(self) -> bool:
        return self._running is not None

    def close(self) -> None:
        """End what runs, refuse what waits, and wait for the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._jobs, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if not self._jobs:
                    return
                job = self._running = self._jobs.popleft()
            if job.cancelled:
                job.put("end")
                continue
            self._work(job)

    def _work(self, job: Job[Any]) -> None:
        job.began = time.monotonic()
        try:
            items = job.work(job)
            try:
                for item in items:
                    job.put("item", item)
                    if job.cancelled:
                        break
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
            job.put("end")
        except BaseException as problem:  # the reader's to deal with; the thread must live on
            job.put("error", problem)
        self.done += 1
        self._mean_s += (time.monotonic() - job.began - self._mean_s) / 8
