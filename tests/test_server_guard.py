"""Who may ask: Host, Origin, token, size and number; and what every response says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, endless_bundle, http, make_model, served
from starlette.datastructures import Headers

from edgekit.assistant.api import ApiError
from edgekit.assistant.server import Settings
from edgekit.assistant.server_guard import HEADERS, Intake, is_loopback, new_token, refuse_open_server
from edgekit.errors import UserError

TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("guard") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Served]:
    with served(make_model(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def locked(bundle: Path) -> Iterator[Served]:
    settings = Settings(token=TOKEN, hosts=("pi.local",), any_address=True)
    with served(make_model(bundle), settings=settings) as server:
        yield server


def status(server: Served, *headers: tuple[str, str], path: str = "/v1/models", method: str = "GET") -> int:
    return http(server.port, method, path, headers=headers).status


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0",
        "[::2]", "user@localhost", "localhost:x", "localhost/../", "", "localhost:8080, evil.example", "localhost ",
    ],
)  # fmt: skip
def test_foreign_hosts_are_refused(server: Served, host: str) -> None:
    found = status(server, ("Host", host))
    assert found in ((200,) if host.strip() == "localhost" else (421, 400))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:99", "[::1]", "[::1]:8080"])
def test_the_loopback_s_names_are_ours(server: Served, host: str) -> None:
    assert status(server, ("Host", host)) == 200


def test_one_host_alone(server: Served) -> None:
    assert status(server) in (400, 421)
    assert status(server, ("Host", "localhost"), ("Host", "evil.example")) in (400, 421)


def test_a_server_for_all_takes_addresses_but_no_foreign_names(locked: Served) -> None:
    bearer = ("Authorization", f"Bearer {TOKEN}")
    for host, expected in (("192.168.1.5:8080", 200), ("[fe80::1]", 200), ("pi.local", 200), ("evil.example", 421)):
        assert status(locked, ("Host", host), bearer) == expected, host


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, 200), ("http://localhost:8080", 200), ("https://localhost:8080", 200), ("http://localhost", 403),
        ("http://localhost:8081", 403), ("http://evil.example", 403), ("null", 403), ("file://", 403), ("", 403),
        ("chrome-extension://abc", 403), ("http://localhost:8080.evil.example", 403),
    ],
)  # fmt: skip
def test_origins(server: Served, origin: str | None, expected: int) -> None:
    headers = [("Host", "localhost:8080"), *([("Origin", origin)] if origin is not None else [])]
    assert status(server, *headers) == expected


def test_requests_that_a_foreign_page_makes_a_browser_send(server: Served) -> None:
    assert status(server, ("Host", "localhost"), ("Sec-Fetch-Site", "cross-site")) == 403
    assert (
        status(server, ("Host", "localhost"), ("Sec-Fetch-Site", "cross-site"), path="/") == 200
    )  # a link to the page
    assert status(server, ("Host", "localhost"), ("Sec-Fetch-Site", "same-origin")) == 200
    answer = http(server.port, "OPTIONS", "/v1/chat/completions",
                  headers=[("Host", "localhost"), ("Origin", "http://evil.example")])  # fmt: skip
    assert answer.status == 403
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN,
     f"Bearer {TOKEN.upper()}", "Bearer \xff\xfe"],
)  # fmt: skip
def test_wrong_tokens(locked: Served, given: str | None) -> None:
    headers = [("Host", "localhost"), *([("Authorization", given)] if given is not None else [])]
    for path in ("/v1/models", "/api/status", "/api/conversations", "/metrics", "/nothing", "/api/export"):
        answer = http(locked.port, "GET", path, headers=headers)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert json.loads(answer.body)["error"]["code"] == "invalid_api_key"
        assert TOKEN not in answer.body.decode()


def test_the_right_token_and_what_needs_none(locked: Served) -> None:
    for scheme in ("Bearer", "bearer"):
        assert status(locked, ("Host", "localhost"), ("Authorization", f"{scheme} {TOKEN}")) == 200
    for path in ("/", "/health", "/static/page.js"):
        assert status(locked, ("Host", "localhost"), path=path) == 200
    assert status(locked, ("Host", "localhost"), path="/static/../api/status") == 404


def read_bodies(intake: Intake, bodies: list[list[bytes]], length: str = "") -> list[bytes | int]:
    """What comes of bodies that arrive in turns, chunk by chunk: their bytes, or the status of the refusal."""

    async def one(chunks: list[bytes]) -> bytes | int:
        left = list(chunks)

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        try:
            return await intake.read(receive, Headers({"content-length": length} if length else {}))
        except ApiError as problem:
            return problem.status

    async def every() -> list[bytes | int]:
        return list(await asyncio.gather(*map(one, bodies)))

    return asyncio.run(every())


def test_bodies_are_bounded_each_and_together() -> None:
    intake = Intake(each=100, total=250)
    assert read_bodies(intake, [[b"x" * 50, b"y" * 50]]) == [b"x" * 50 + b"y" * 50]
    assert read_bodies(intake, [[b"x" * 50, b"y" * 51]]) == [413]
    assert read_bodies(intake, [[b"x"]], length="101") == [413]
    found = read_bodies(intake, [[b"x" * 30] * 3] * 6)
    assert sorted({status for status in found if isinstance(status, int)}) == [503]
    assert b"x" * 90 in found
    assert read_bodies(intake, [[b"x" * 100]]) == [b"x" * 100]  # all of it was given back


def test_every_response_carries_the_headers(server: Served) -> None:
    for path, host in (
        ("/", "localhost"),
        ("/v1/models", "localhost"),
        ("/nothing", "localhost"),
        ("/", "evil.example"),
    ):
        answer = http(server.port, "GET", path, headers=[("Host", host)])
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, path
        assert "server" not in answer.headers
    policy = HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("127.8.8.8", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.2", False), ("raspberrypi", False), ("", False)],
)  # fmt: skip
def test_a_server_that_others_reach_needs_a_token(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    refuse_open_server(host, new_token())
    if loopback:
        refuse_open_server(host, None)
    else:
        with pytest.raises(UserError, match="needs a token"):
            refuse_open_server(host, None)


@pytest.mark.parametrize("token", ["", "short", "ä" * 20, "a b\n" * 8])
def test_tokens_that_can_be_guessed_or_not_sent(token: str) -> None:
    with pytest.raises(UserError, match="--token must have at least"):
        refuse_open_server("127.0.0.1", token)


def test_new_tokens_are_long_and_never_the_same() -> None:
    assert len({new_token() for _ in range(100)}) == 100
    assert all(len(new_token()) == 32 for _ in range(10))
