"""The line: order, bounds, cancelling before and during a job, time limits, and errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from edgekit.assistant.queue import Full, Job, Line

T = TypeVar("T")


def run(test: Callable[[Line], Coroutine[Any, Any, T]], *, waiting: int = 8) -> T:
    with Line(waiting=waiting) as line:
        return asyncio.run(asyncio.wait_for(test(line), 20))


async def collected(job: Job[T]) -> list[T]:
    return [item async for item in job]


def held(gate: threading.Event, entered: threading.Event) -> Callable[[Job[int]], Iterator[int]]:
    """A job that gives 0, waits for the gate, gives 1."""

    def work(job: Job[int]) -> Iterator[int]:
        yield 0
        entered.set()
        assert gate.wait(10)
        yield 1

    return work


def test_jobs_run_one_after_the_other_in_order() -> None:
    seen: list[int] = []

    def work(number: int) -> Callable[[Job[int]], Iterator[int]]:
        def items(job: Job[int]) -> Iterator[int]:
            for _ in range(3):
                seen.append(number)
                yield number

        return items

    async def test(line: Line) -> list[list[int]]:
        jobs = [line.submit(work(number), seconds=9) for number in range(4)]
        return list(await asyncio.gather(*map(collected, jobs)))

    assert run(test) == [[n, n, n] for n in range(4)]
    assert seen == [n for n in range(4) for _ in range(3)]


def test_a_full_line_refuses_and_says_when() -> None:
    gate, entered = threading.Event(), threading.Event()

    async def test(line: Line) -> None:
        jobs = [line.submit(held(gate, entered), seconds=9)]
        await asyncio.to_thread(entered.wait, 10)
        jobs += [line.submit(held(gate, entered), seconds=9) for _ in range(2)]
        assert (line.waiting, line.busy) == (2, True)
        with pytest.raises(Full, match="2 wait") as problem:
            line.submit(held(gate, entered), seconds=9)
        assert 1 <= problem.value.retry_after_s <= 60
        assert line.refused == 1
        gate.set()
        assert await asyncio.gather(*map(collected, jobs)) == [[0, 1]] * 3

    run(test, waiting=2)


def test_without_waiting_one_runs_and_the_next_is_refused() -> None:
    gate, entered = threading.Event(), threading.Event()

    async def test(line: Line) -> None:
        job = line.submit(held(gate, entered), seconds=9)
        await asyncio.to_thread(entered.wait, 10)
        with pytest.raises(Full):
            line.submit(held(gate, entered), seconds=9)
        gate.set()
        assert await collected(job) == [0, 1]

    run(test, waiting=0)


def test_cancelled_jobs_are_not_begun_and_leave_room() -> None:
    gate, entered, begun = threading.Event(), threading.Event(), threading.Event()

    def never(job: Job[int]) -> Iterator[int]:
        begun.set()
        yield 1

    async def test(line: Line) -> None:
        first = line.submit(held(gate, entered), seconds=9)
        await asyncio.to_thread(entered.wait, 10)
        second = line.submit(never, seconds=9)
        second.cancel()
        assert line.waiting == 0
        third = line.submit(held(gate, entered), seconds=9)  # the one place is free again
        gate.set()
        assert await asyncio.gather(collected(first), collected(second), collected(third)) == [[0, 1], [], [0, 1]]

    run(test, waiting=1)
    assert not begun.is_set()


def test_cancelling_a_running_job_closes_its_iterator() -> None:
    closed = threading.Event()
    given: list[int] = []

    def endless(job: Job[int]) -> Iterator[int]:
        try:
            while True:
                given.append(1)
                yield 1
        finally:
            closed.set()

    async def test(line: Line) -> None:
        job = line.submit(endless, seconds=9)
        async for _ in job:
            break
        job.cancel()
        assert await asyncio.to_thread(closed.wait, 10)
        assert await collected(line.submit(lambda job: iter([7]), seconds=9)) == [7]

    run(test)


def test_work_learns_that_its_time_is_over() -> None:
    def patient(job: Job[str]) -> Iterator[str]:
        while job.wanted():
            yield "more"
        yield "late" if job.late else "cancelled"

    async def test(line: Line) -> list[str]:
        return await collected(line.submit(patient, seconds=0.05))

    assert run(test)[-1] == "late"


def test_errors_reach_the_reader_and_the_thread_lives_on() -> None:
    def broken(job: Job[int]) -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    def stillborn(job: Job[int]) -> Iterator[int]:
        raise KeyError("stillborn")

    async def test(line: Line) -> None:
        events = aiter(line.submit(broken, seconds=9))
        assert await anext(events) == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(events)
        with pytest.raises(KeyError, match="stillborn"):
            await collected(line.submit(stillborn, seconds=9))
        assert await collected(line.submit(lambda job: iter([7]), seconds=9)) == [7]
        assert line.done == 3

    run(test)


def test_closing_ends_what_runs() -> None:
    def endless(job: Job[int]) -> Iterator[int]:
        while True:
            yield 1

    async def test(line: Line) -> None:
        job, waiting = line.submit(endless, seconds=99), line.submit(endless, seconds=99)
        assert await anext(aiter(job)) == 1
        await asyncio.to_thread(line.close)
        assert await collected(waiting) == []

    run(test)
