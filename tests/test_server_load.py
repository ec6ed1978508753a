"""The server under pressure, in a process of its own: many clients, slow and vanishing ones, large and broken bodies.

After each the server still answers; its memory is bounded; and all of it works where there is no network.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import endless_bundle, http

from edgekit.assistant.records import Records
from edgekit.profile.memory import read_memory

pytestmark = pytest.mark.slow
CLIENTS = 200
IN_THE_BROWSER = "test_ask_stream_stop_cite_reload"
OFFLINE = "not default_embedder_is_made"  # that one fetches the embedder, once
HELLO = [{"role": "user", "content": "Hello"}]

LONE = """
import fcntl, os, socket, struct, sys
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
name = struct.pack("16sh", b"lo", 0)
flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, name))[1]
fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", flags | 1))
assert [name for _, name in socket.if_nameindex()] == ["lo"], socket.if_nameindex()
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError:
    pass
else:
    raise SystemExit("there is a network")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("load") / "bundle", context=2048)


class Process:
    """`edgekit serve` as a user runs it."""

    def __init__(self, bundle: Path, log: Path, *options: str) -> None:
        words = ["serve", str(bundle), "--port", "0", "--threads", "1", "--log", str(log), *options]
        code = "import sys; from edgekit.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)/", line)
        assert found, line + (self.process.stderr.read() if self.process.stderr else "")
        self.port = int(found[1])

    def answers(self) -> None:
        """Wait until the line is empty, and ask something."""
        end = time.monotonic() + 60
        while True:
            status = json.loads(http(self.port, "GET", "/api/status").body)
            if not status["busy"] and not status["waiting"]:
                break
            assert time.monotonic() < end, status
            time.sleep(0.05)
        body = json.dumps({"model": "bundle", "messages": HELLO, "max_tokens": 2}).encode()
        headers = [("Host", "localhost"), ("Content-Type", "application/json")]
        assert http(self.port, "POST", "/v1/chat/completions", headers=headers, body=body).status == 200

    @property
    def memory(self) -> int:
        size = read_memory(pid=self.process.pid).pss_bytes
        assert size is not None
        return size

    def stop(self, how: int = signal.SIGTERM) -> str:
        self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=20)
        return errors


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(bundle, tmp_path_factory.mktemp("log") / "log.db", "--waiting", "16")
    yield process
    errors = process.stop()
    assert "Traceback" not in errors, errors


async def exchange(port: int, body: bytes, *, read: int | None = None, pause: float = 0.0) -> int | None:
    """One chat over a connection of its own; its status. `read`: bytes after which it goes; `pause` between them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close"
        writer.write(f"{head}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        await writer.drain()
        received = b""
        while read is None or len(received) < read:
            chunk = await asyncio.wait_for(reader.read(4096 if not pause else 64), 120)
            if not chunk:
                break
            received += chunk
            await asyncio.sleep(pause)
        return int(received.split(b" ", 2)[1]) if received else None
    except (ConnectionError, BrokenPipeError):
        return None
    finally:
        writer.close()


def chat(**options: object) -> bytes:
    return json.dumps({"model": "bundle", "messages": HELLO, "max_tokens": 8, **options}).encode()


def test_200_clients_at_once(server: Process) -> None:
    async def all_of_them() -> list[int | None]:
        return list(await asyncio.gather(*(exchange(server.port, chat(stream=n % 2 == 0)) for n in range(CLIENTS))))

    found = Counter(asyncio.run(all_of_them()))
    assert set(found) == {200, 503}, found
    assert found[200] >= 17  # the one that runs and those who wait
    server.answers()


def test_200_clients_that_come_back_when_they_are_told(server: Process) -> None:
    async def patient(number: int) -> int:
        tries = 0
        while await exchange(server.port, chat()) != 200:
            tries += 1
            assert tries < 200
            await asyncio.sleep(0.2 + number % 7 / 10)
        return tries

    async def all_of_them() -> list[int]:
        return list(await asyncio.gather(*map(patient, range(CLIENTS))))

    assert len(asyncio.run(all_of_them())) == CLIENTS
    server.answers()


def test_slow_readers_and_those_who_vanish_hold_nobody_up(server: Process) -> None:
    async def all_of_them() -> list[int | None]:
        long = chat(stream=True, max_tokens=1000)
        slow = [exchange(server.port, long, pause=0.05, read=3000) for _ in range(8)]
        gone = [exchange(server.port, long, read=300) for _ in range(60)]
        mute = [exchange(server.port, long, read=0) for _ in range(60)]
        return list(await asyncio.gather(*slow, *gone, *mute))

    before = server.memory
    found = Counter(asyncio.run(all_of_them()))
    assert set(found) <= {200, 503, None}, found
    server.answers()
    assert server.memory - before < 30e6


def test_large_and_broken_bodies_at_once(server: Process) -> None:
    large = b'{"model": "bundle", "messages": "' + b"x" * 10_000_000 + b'"}'
    bodies = [large] * 12 + [b"{", b"\xff" * 1000, b"[" * 500_000, b"null", b'{"a": 1e999}', b"9" * 1_000_000] * 10

    async def all_of_them() -> list[int | None]:
        return list(await asyncio.gather(*(exchange(server.port, body) for body in bodies)))

    before = server.memory
    found = asyncio.run(all_of_them())
    assert Counter(found[:12]) == {413: 12}
    assert Counter(found[12:]) == {400: 60}
    server.answers()
    assert server.memory - before < 60e6


def test_connections_that_say_nothing(server: Process) -> None:
    async def idle() -> None:
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CLIENTS)]
        for _, writer in opened[::2]:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.answers)
        for _, writer in opened:
            writer.close()

    asyncio.run(idle())
    server.answers()


def test_kill_loses_at_most_the_answer_in_the_making(bundle: Path, tmp_path: Path) -> None:
    process = Process(bundle, tmp_path / "log.db")
    name = "f" * 32
    for _ in range(3):
        body = chat(edgekit={"conversation": name})
        assert asyncio.run(exchange(process.port, body)) == 200
    long = chat(edgekit={"conversation": name}, max_tokens=1000, stream=True)
    assert asyncio.run(exchange(process.port, long, read=400)) == 200
    process.stop(signal.SIGKILL)
    entries = Records.open(tmp_path / "log.db").read(name)
    assert [entry.role for entry in entries[:7]] == ["user", "assistant"] * 3 + ["user"]
    again = Process(bundle, tmp_path / "log.db")
    again.answers()
    assert "Traceback" not in again.stop()


ASSISTANT = [
    *("answer", "api", "control", "documents", "filter", "index", "prefix", "privacy", "queue", "reading"),
    *("records", "router", "search", "server", "server_chat", "server_guard", "structure", "tools"),
]


def test_all_of_it_where_there_is_only_the_loopback(tmp_path: Path) -> None:
    """All tests of the assistant, and the page's where there is a browser, in a network namespace of their own."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody make network namespaces (unshare -rn)")
    here = Path(__file__).parent
    files = [*(here / f"test_{name}.py" for name in ASSISTANT), f"{here / 'test_server_page.py'}::{IN_THE_BROWSER}"]
    words = ["unshare", "-rn", sys.executable, "-c", LONE, "-m", "pytest", "-m", "slow or not slow", "-k", OFFLINE]
    done = subprocess.run(
        [*words, *map(str, files)],
        cwd=here.parent,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
