"""Listening: uvicorn as it is used here, with connections that are closed when they ask for nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgekit.errors import UserError

HEAD_S = 20.0  # how long a connection may take until it has asked for something


class _Connection(H11Protocol):
    """A connection that is closed when it asks for nothing: uvicorn waits for the head of a request for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        nothing = self.cycle is None or self.cycle.response_complete
        if nothing and self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)
        elif not nothing and self._timer is not None:
            self._timer.cancel()
            self._timer = None


def serve(app: ASGIApp, *, host: str, port: int, started: Callable[[int], None]) -> None:
    """Listen until interrupted; `started` is told the port. Raises UserError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=512)
    except OSError as problem:
        raise UserError(
            f"the server must be able to listen: {host} port {port}: {problem.strerror}; use another --port"
        ) from problem
    with listener:
        started(listener.getsockname()[1])
        uvicorn_server(app).run(sockets=[listener])


def uvicorn_server(app: ASGIApp) -> uvicorn.Server:
    """What carries the application: HTTP/1.1 alone, no proxy believed, nothing written to a log."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64_000,
    )
    return uvicorn.Server(config)
