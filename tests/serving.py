"""A server for tests: a tiny bundle behind real sockets, in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp
from test_reference import tiny_checkpoint

from edgekit.assistant.answer import Citation, Event, Finished, Opened, Reply, Routed, Sources, Text
from edgekit.assistant.queue import Line
from edgekit.assistant.reading import Reading
from edgekit.assistant.records import Records
from edgekit.assistant.router import Decision
from edgekit.assistant.search import Found, Passage
from edgekit.assistant.server import Settings, make_app
from edgekit.assistant.server_chat import Model
from edgekit.assistant.server_listen import uvicorn_server
from edgekit.assistant.server_metrics import Meter, Metrics
from edgekit.assistant.tools import CALCULATOR, clock
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.runtime.session import Session


@dataclass(frozen=True)
class Served:
    """A running server. `model` and `line` are its own."""

    url: str
    port: int
    model: Model
    line: Line
    records: Records | None


def endless_bundle(path: Path, *, context: int = 256) -> Path:
    """A bundle whose random model never ends by itself."""
    checkpoint = tiny_checkpoint(config={"eos_token_id": None, "max_position_embeddings": context})
    export(checkpoint, path, target=TARGETS["portable"])
    return path


def make_model(bundle: Path, **options: Any) -> Model:
    options = {"name": "tiny", "tools": [CALCULATOR, clock()], **options}
    session = Session.open(bundle, threads=1)
    return Model(session=session, meter=Meter(None, "no sensor"), metrics=Metrics(), **options)


@contextmanager
def served(
    model: Model, *, records: Records | None = None, settings: Settings | None = None, waiting: int = 32
) -> Iterator[Served]:
    """Serve a model on a free port of the loopback address."""
    with Line(waiting=waiting) as line:
        app = make_app(model, line, records=records, settings=settings or Settings())
        with listening(app) as port:
            yield Served(f"http://127.0.0.1:{port}", port, model, line, records)


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """Serve an application on a free port of the loopback address."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


@dataclass
class Response:
    """What came back over a plain socket."""

    status: int
    headers: dict[str, str]
    body: bytes


def raw(port: int, data: bytes, *, timeout: float = 20.0) -> Response:
    """Send bytes as they are and read until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Response(int(first.split()[1]), headers, body)


def http(
    port: int, method: str, path: str, *, headers: Sequence[tuple[str, str]] | None = None, body: bytes = b""
) -> Response:
    """One request with exactly these headers (by default the right Host), and the length of the body."""
    given = [("Host", f"127.0.0.1:{port}")] if headers is None else list(headers)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given), "Connection: close"]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return raw(port, "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


PASSAGE = "Staff may work from home on two days a week. The days are agreed with the team."
QUOTE = "Staff may work from home on two days a week."


class ScriptedAssistant:
    """Answers every question alike, with two sources that it cites and one more, a route and a checked quote."""

    def __init__(self, *, to: str = "here") -> None:
        self.to = to
        self.endpoint = "http://models.example/v1" if to == "elsewhere" else None
        self.asked: list[tuple[str, int]] = []
        self.documents: list[str | None] = []

    def answer(self, question: str, history: Sequence[Any] = (), **options: Any) -> Iterator[Event]:
        self.asked.append((question, len(history)))
        self.documents.append(options["document"])
        passages = tuple(
            Passage(name, title, heading, start, start + len(text), text, 0.03, 0.7, 0.9)
            for name, title, heading, start, text in (
                ("handbook/remote-work.md", "Remote work", "Where we work > From home", 412, PASSAGE),
                (
                    "handbook/hours.md",
                    "Working hours",
                    "Core hours",
                    90,
                    "Core hours are from 10 to 15. The rest is free.",
                ),
                ("handbook/leave.md", "Leave", "Holidays", 20, "Everybody has thirty days of holiday a year."),
            )
        )
        yield Sources(Found(passages, 0.9, 0.4, 3.0))
        decision = Decision(to=self.to, stage="before", reason="the question is simple", endpoint="models.example")  # type: ignore[arg-type]
        yield Routed(decision)
        if options["document"] is not None:
            yield Opened(Reading(options["document"], 1234, "disk", 0.02))
        pieces = ["Staff may work ", "from home on ", "**two days a week** [1], ", "outside of the core hours [2]."]
        for piece in pieces:
            time.sleep(0.02)
            yield Text(piece)
        citation = Citation(1, passages[0].document, passages[0].heading, 412, 412 + len(QUOTE), QUOTE)
        yield Finished(Reply("".join(pieces), (citation,), "stop", decision, 40, 18, 0, 0.1, None))
