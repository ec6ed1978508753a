"""What stands before every route: who may ask, from where, and how much.

- Host must name this server, so that a foreign name which was made to point here (DNS rebinding) gets nothing.
- Origin, which a browser sends, must be the page's own: a foreign page can neither read nor start anything.
- A token, where there is one, for all but the page's files and /health; compared in constant time.
- A bounded number of requests at a time, of a bounded size, each within a bounded time.

Every response says what the page may load (nothing from elsewhere) and that nobody may frame or guess it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgekit.assistant.api import ApiError
from edgekit.errors import UserError

MAX_BODY = 2_000_000  # bytes
MAX_INTAKE = 32_000_000  # of all bodies that are being read
MAX_DRAIN = 64_000_000  # of a body that was refused, so that its sender reads the refusal
BODY_S = 30.0
MAX_REQUESTS = 400  # at a time
LEAST_TOKEN = 16  # characters
OPEN_PATHS = ("/", "/health")
STATIC = "/static/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_server(host: str, token: str | None) -> None:
    """Raises UserError: other machines could reach the server without a token, or with one that can be guessed."""
    if token is None and not is_loopback(host):
        raise UserError(f"a server that others can reach needs a token: --host is {host}; add --token auto")
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(
            f"--token must have at least {LEAST_TOKEN} printable ASCII characters: got {len(token)}; or auto"
        )


class Guard:
    """The application behind its checks. `hosts` are the names that the server goes by beside the loopback's; with
    `any_address`, for a server that listens on all addresses, any IP address is one too: only names can be rebound."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: Sequence[str] = (),
        any_address: bool = False,
        count: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        self._app = app
        self._token = None if token is None else _digest(token)
        self._hosts = {host.lower() for host in (*LOOPBACK, *hosts)}
        self._any_address = any_address
        self._count = count
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                self._count(scope["path"], message["status"])
            await send(message)

        self._running += 1
        try:
            self._check(scope)
        except ApiError as problem:
            await respond(guarded, problem, receive)
        else:
            await self._app(scope, receive, guarded)
        finally:
            self._running -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._running > MAX_REQUESTS:
            raise ApiError("too many requests at a time", status=503, code="overloaded", retry_after_s=5)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            shown = hosts[0] if len(hosts) == 1 else f"{len(hosts)} of them"
            raise ApiError(f"Host must name this server: got {shown!r:.80}; start it with --allow-host", status=421)
        origin = headers.get("origin")
        if origin is not None and not _same(origin, hosts[0]):
            raise ApiError(f"requests of other pages are refused: Origin is {origin!r:.80}", status=403)
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] not in OPEN_PATHS:
            raise ApiError("requests of other pages are refused", status=403)
        path = scope["path"]
        if self._token is not None and path not in OPEN_PATHS and not path.startswith(STATIC):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(_digest(given.strip()), self._token)
            if scheme.lower() != "bearer" or not right:
                raise ApiError("a request must carry the server's token: Authorization: Bearer TOKEN", status=401,
                               code="invalid_api_key")  # fmt: skip

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name = parts.hostname or ""
            _ = parts.port  # raises for one that is none
        except ValueError:
            return False
        if parts.username is not None or parts.path or parts.query or parts.fragment:
            return False
        shown = f"[{name}]" if ":" in name else name
        if shown in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address


class Intake:
    """Reads the bodies of requests: each of at most `each` bytes, and at most `total` of them at a time."""

    def __init__(self, *, each: int = MAX_BODY, total: int = MAX_INTAKE) -> None:
        self._each = each
        self._total = total
        self._held = 0

    async def read(self, receive: Receive, headers: Headers) -> bytes:
        """The body of a request. Raises ApiError: too large or no room (the rest is dropped), too slow, or given up."""
        length = headers.get("content-length", "")
        refusal = self._refusal(int(length) if length.isdecimal() else 0)
        parts: list[bytes] = []
        size = held = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("the client went away", status=499)
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if refusal is None:
                        parts.append(chunk)
                        held += len(chunk)
                        self._held += len(chunk)
                        refusal = self._refusal(size)
                    if refusal is not None:
                        parts.clear()
                        self._held -= held
                        held = 0
                        if size > MAX_DRAIN:
                            raise refusal
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(f"a request must arrive within {BODY_S:.0f} s", status=408) from None
        finally:
            self._held -= held
        if refusal is not None:
            raise refusal
        return b"".join(parts)

    def _refusal(self, size: int) -> ApiError | None:
        if size > self._each:
            return ApiError(f"a request must have at most {self._each} bytes", status=413, code="request_too_large")
        if self._held > self._total:
            return ApiError("too many large requests at a time", status=503, code="overloaded", retry_after_s=5)
        return None


async def respond(send: Send, problem: ApiError, receive: Receive | None = None) -> None:
    """Send an error. With `receive`, what the client still sends is dropped first: it reads no answer before."""
    if receive is not None:
        with contextlib.suppress(ApiError):
            await Intake(each=0).read(receive, Headers())
    headers = {"content-type": "application/json"}
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(problem.retry_after_s)
    if problem.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = json.dumps(problem.to_json(), ensure_ascii=False).encode()
    raw: list[tuple[bytes, bytes]] = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    start: dict[str, Any] = {"type": "http.response.start", "status": problem.status, "headers": raw}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _same(origin: str, host: str) -> bool:
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and rest.lower() == host.lower()


def new_token() -> str:
    """A token that nobody guesses: 32 characters of 5 bits and more."""
    return secrets.token_urlsafe(24)
