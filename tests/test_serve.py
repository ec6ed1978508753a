"""`edgekit serve`: what it refuses before it listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from command_line import ek
from serving import endless_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("serve") / "bundle")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--host", "0.0.0.0"], "a server that others can reach needs a token"),
        (["--host", "::"], "a server that others can reach needs a token"),
        (["--token", "short"], "--token must have at least 16"),
        (["--router", "router.toml"], "--router needs --docs"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--port", "70000"], "70000"),
        (["--waiting", "-1"], "-1"),
        (["--max-tokens", "0"], "0"),
        (["--power", "sun"], "--power must be"),
        (["--keep-days", "-1"], "--keep-days must be at least 0"),
        (["--filter", "none.toml"], "none.toml"),
        (["--context", "9999"], "--context must be from 1"),
    ],
)
def test_wrong_options_are_refused(bundle: Path, tmp_path: Path, words: list[str], problem: str) -> None:
    done = ek("serve", bundle, "--log", tmp_path / "log.db", *words)
    assert (done.status, done.out) == (2, "")
    assert problem in done.err


def test_a_port_that_is_taken(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = ek("serve", bundle, "--no-log", "--port", str(listener.getsockname()[1]))
    assert done.status == 2
    assert "must be able to listen" in done.err


def test_no_bundle(tmp_path: Path) -> None:
    done = ek("serve", tmp_path / "none", "--no-log")
    assert done.status == 2
