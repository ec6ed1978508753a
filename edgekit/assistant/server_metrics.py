"""What an answer costs, and what a server did so far, as Prometheus reads it.

Energy is what the machine's power sensor saw while an answer was made (`edgekit.profile.power`): of everything that the
sensor covers, the rest of the machine included. Without a sensor, or where it is too slow for a short answer, there are
no joules but a reason.
Source: Prometheus, text-based exposition format 0.0.4.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from edgekit.profile.memory import read_memory
from edgekit.profile.power import PowerLog, PowerSource
from edgekit.runtime.session import Timing


@dataclass(frozen=True)
class Cost:
    """What one answer took. `seconds` counts from its turn to its end; `tokens_per_second` counts the times between
    tokens, None below two tokens; `joules` is None where `joules_reason` says why."""

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    seconds: float
    first_token_s: float | None
    tokens_per_second: float | None
    joules: float | None
    joules_reason: str


def speed(timing: Timing | None) -> float | None:
    """Generated tokens a second, from the times between them."""
    return len(timing.gaps) / sum(timing.gaps) if timing is not None and timing.gaps else None


@dataclass
class Reading:
    """Filled when the metered block ends."""

    seconds: float = 0.0
    joules: float | None = None
    reason: str = ""


class Meter:
    """Time and energy of a block. `source` is None, and `reason` says why, where the machine has no sensor."""

    def __init__(self, source: PowerSource | None, reason: str) -> None:
        self.source = source
        self.reason = reason

    @contextmanager
    def running(self, reading: Reading) -> Iterator[None]:
        """Meter the block, however it ends."""
        begin = end = time.perf_counter()
        log = None if self.source is None else PowerLog(self.source)
        try:
            with log or nullcontext():
                begin = time.perf_counter()
                try:
                    yield
                finally:
                    end = time.perf_counter()
        finally:
            reading.seconds, reading.reason = end - begin, self.reason
            if log is not None:
                energy = log.energy([(begin, end)])
                reading.joules, reading.reason = energy.joules, energy.reason


@dataclass
class Metrics:
    """Counters since the server began. Several threads may count."""

    started: float = field(default_factory=time.time)
    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    unmetered: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def request(self, route: str, status: int) -> None:
        with self._lock:
            self.requests[route, status] = self.requests.get((route, status), 0) + 1

    def answer(self, reason: str, cost: Cost) -> None:
        """Count an answer that ended for `reason`."""
        with self._lock:
            self.answers[reason] = self.answers.get(reason, 0) + 1
            self.prompt_tokens += cost.prompt_tokens
            self.reused_tokens += cost.reused_tokens
            self.generated_tokens += cost.generated_tokens
            self.seconds += cost.seconds
            if cost.joules is None:
                self.unmetered += 1
            else:
                self.joules += cost.joules

    def text(self, *, waiting: int, busy: bool, refused: int) -> str:
        """Everything in Prometheus' format; `waiting`, `busy` and `refused` are the line's."""
        memory = read_memory()
        with self._lock:
            rows: list[tuple[str, str, str, dict[str, float | None]]] = [
                ("requests_total", "counter", "HTTP requests", {
                    f'route="{route}",status="{status}"': count for (route, status), count in self.requests.items()}),
                ("answers_total", "counter", "answers by how they ended", {
                    f'reason="{reason}"': count for reason, count in self.answers.items()}),
                ("tokens_total", "counter", "tokens of prompts, of those the ones found in the cache, and of answers", {
                    'kind="prompt"': self.prompt_tokens, 'kind="reused"': self.reused_tokens,
                    'kind="generated"': self.generated_tokens}),
                ("answer_seconds_total", "counter", "time spent on answers", {"": self.seconds}),
                ("answer_joules_total", "counter", "energy of the answers that a sensor measured", {"": self.joules}),
                ("answers_unmetered_total", "counter", "answers without a measured energy", {"": self.unmetered}),
                ("refused_total", "counter", "requests refused because the line was full", {"": refused}),
                ("waiting", "gauge", "requests that wait for the model", {"": waiting}),
                ("busy", "gauge", "1 while the model works", {"": float(busy)}),
                ("memory_pss_bytes", "gauge", "memory of the server, shared pages divided", {"": memory.pss_bytes}),
                ("memory_private_bytes", "gauge", "memory that no file backs", {"": memory.private_bytes}),
                ("start_time_seconds", "gauge", "when the server began, Unix time", {"": self.started}),
            ]  # fmt: skip
        lines = []
        for name, kind, about, values in rows:
            known = {labels: value for labels, value in values.items() if value is not None}
            if known:
                lines += [f"# HELP edgekit_{name} {about}", f"# TYPE edgekit_{name} {kind}"]
                lines += [
                    f"edgekit_{name}{{{labels}}} {v}" if labels else f"edgekit_{name} {v}"
                    for labels, v in known.items()
                ]
        return "\n".join(lines) + "\n"
