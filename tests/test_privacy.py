"""Nothing private leaves: 200 texts against an endpoint that records what it gets."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from knowledge import make_index

from edgekit.assistant.handover import Endpoint, Handover, Unreachable, load_settings
from edgekit.assistant.index import Index
from edgekit.assistant.privacy import Privacy, Rules, builtin_match
from edgekit.errors import UserError

SECRETS = {
    "an e-mail address": ("ada.quill@example.org", "ADA(at)example.org", "ada+x@mail.example.co.uk"),
    "a telephone number": (
        "+49 30 901820",
        "(555) 123-4567",
        "555.123.4567",
        "0049-30-901820",
        "call me at 030 901820",
    ),
    "an IBAN": ("DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"),
    "a card number": ("4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005", "4111 1111 1111 1111 12/27"),
    "a national number": ("123-45-6789", "passport C01X00T47", "SSN: 123456789"),
    "a network address": ("192.168.1.17",),
    "a key": ("sk-abcdefghijklmnop1234", "ghp_0123456789abcdefABCDEF", "AKIAIOSFODNN7EXAMPLE"),
    "a password": ("my password is hunter2", "PIN: 4711", "api_key = x9"),
    "a date of birth": ("born on 3 May 1990", "DOB 1990-05-03"),
    "a street address": ("12 Baker Street", "221 North Elm Ave"),
}
FRAMES = (
    "{}",
    "Is {} still right?",
    "Please write to {} about the invoice and say hello",
    "text before\n{}\ntext after",
)
TRICKS = (
    str,
    str.upper,
    lambda s: s.replace(" ", "\u00a0"),
    lambda s: s.translate({48 + n: 0xFF10 + n for n in range(10)}),
)


def private_texts() -> list[str]:
    """200 texts, each of which has something private."""
    texts = [
        frame.format(trick(secret))
        for group in SECRETS.values()
        for secret in group
        for frame in FRAMES
        for trick in TRICKS
    ]
    texts += [f"Project Falcon {word}" for word in ("budget?", "is late.", "team")]
    return list(dict.fromkeys(texts))[:: max(1, len(dict.fromkeys(texts)) // 200)][:200]


PUBLIC = (
    "What is the capital of France?", "When did the 1973 oil crisis begin?", "How many people live in Warsaw in 2013?",
    "Explain 2 + 2 = 4 to a child.", "Is 3.14159265358979 pi?", "Who won Super Bowl 50 on February 7, 2016?",
    "What did the token ring network do?", "What is a pin in chess?", "How far is it from mile 12 to mile 400?",
)  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("trick", TRICKS)
def test_kinds_are_recognised(kind: str, frame: str, trick: object) -> None:
    for secret in SECRETS[kind]:
        assert builtin_match(frame.format(trick(secret))) is not None, secret  # type: ignore[operator]


@pytest.mark.parametrize("text", PUBLIC)
def test_what_is_not_private_may_go(text: str) -> None:
    assert builtin_match(text) is None


@dataclass
class Larger:
    """A server with OpenAI's interface; `got` are the bodies that it received."""

    url: str = ""
    got: list[str] = field(default_factory=list)
    reply: bytes = json.dumps({"choices": [{"message": {"content": "From afar."}}]}).encode()
    status: int = 200
    location: str = ""


@pytest.fixture
def larger() -> Iterator[Larger]:
    state = Larger()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.got.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(state.status)
            if state.location:
                self.send_header("Location", state.location)
            self.end_headers()
            self.wfile.write(state.reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        yield state
        server.shutdown()
        thread.join()


def door(larger: Larger, log: Path, privacy: Privacy = Privacy(patterns=("project falcon",))) -> Handover:  # noqa: B008
    return Handover(Endpoint(larger.url, "big", seconds=5), log, Rules(privacy))


def test_none_of_200_private_texts_leaves_and_each_public_one_does(larger: Larger, tmp_path: Path) -> None:
    texts = private_texts()
    assert len(texts) == 200
    opened = door(larger, tmp_path / "log.jsonl")
    for text in texts:
        with pytest.raises(Unreachable, match="it stays here"):
            opened.ask(text, [], [], wrong=1.0)
        with pytest.raises(Unreachable, match="it stays here"):
            opened.ask("A public question?", ["a public passage", text], ["a.md", "b.md"], wrong=1.0)
    assert larger.got == []
    assert not (tmp_path / "log.jsonl").exists()
    for text in PUBLIC:
        assert opened.ask(text, ["a passage"], ["a.md"], wrong=0.9) == "From afar."
    assert len(larger.got) == len(PUBLIC)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for text, body, entry in zip(PUBLIC, larger.got, entries, strict=True):
        sent = json.loads(body)["messages"][0]["content"]
        assert text in sent
        assert entry["sent"] == [sent]
        assert entry["to"] == larger.url
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("privacy"))[0]


@pytest.mark.parametrize(
    ("texts", "documents", "private"),
    [
        (["a question"], ["staff/private/pay.md"], True),
        (["a question"], ["STAFF/Private/pay.md"], True),
        (["a question"], ["staff/privateer.md"], False),
        (["Is it so that the salary of Ada Quill is four thousand?"], [], True),
        (["four thousand, and TWO hundred\nmarks a month"], [], True),
        (["What is a salary?"], [], False),
        (["x" * 20_001], [], True),
    ],
)
def test_private_folders_and_what_quotes_them(
    index: Index, texts: list[str], documents: list[str], private: bool
) -> None:
    rules = Rules(Privacy(folders=("staff/private/",)))
    assert (rules.reason(texts, documents, index=index) is not None) == private


@pytest.mark.parametrize("folder", ["/etc", "..", "a/../b", "", "/"])
def test_private_folders_lie_below_the_documents(folder: str) -> None:
    with pytest.raises(UserError, match="below the documents"):
        Privacy(folders=(folder,))


@pytest.mark.parametrize(
    ("status", "reply", "reason"),
    [
        (500, b"", "status 500"),
        (200, b"no json", "not in OpenAI's form"),
        (200, b'{"choices": []}', "not in OpenAI's form"),
        (200, b'{"choices": [{"message": {"content": " "}}]}', "empty"),
        (200, b"x" * 1_000_002, "longer than"),
        (200, b"[" * 100_000, "not in OpenAI's form"),
    ],
)
def test_a_reply_that_is_wrong(status: int, reply: bytes, reason: str, larger: Larger, tmp_path: Path) -> None:
    larger.status, larger.reply = status, reply
    with pytest.raises(Unreachable, match=reason):
        door(larger, tmp_path / "log").ask("A question?", [], [], wrong=None)


def test_a_redirect_is_not_followed(larger: Larger, tmp_path: Path) -> None:
    larger.status, larger.location = 307, f"{larger.url}/elsewhere"
    with pytest.raises(Unreachable, match="status 307"):
        door(larger, tmp_path / "log").ask("A question?", [], [], wrong=None)
    assert len(larger.got) == 1


def test_no_network_means_here(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(Unreachable, match="cannot be reached"):
        Handover(Endpoint(url, "big", seconds=2), tmp_path / "log", Rules(Privacy())).ask("A?", [], [], wrong=None)


def test_without_its_log_nothing_leaves(larger: Larger, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="the log of hand-overs cannot be written"):
        door(larger, tmp_path).ask("A question?", [], [], wrong=None)
    assert larger.got == []


def test_the_key_comes_from_the_environment_and_no_file(larger: Larger, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        f'endpoint = {{url = "{larger.url}", model = "big", key = "BIG_KEY"}}\nrouter = {{model = "r.json"}}\n'
        'log = {path = "log.jsonl"}\nprivacy = {folders = ["a"]}\n'
    )
    settings = load_settings(tmp_path / "r.toml")
    assert settings.log.path == str(tmp_path / "log.jsonl")
    assert settings.router.model == str(tmp_path / "r.json")
    for url in ("ftp://x/v1", "http://user@x/v1", "file:///etc/passwd", "http://", "x"):
        (tmp_path / "bad.toml").write_text(
            f'endpoint = {{url = "{url}", model = "m"}}\nrouter = {{model = "r"}}\nlog = {{path = "l"}}'
        )
        with pytest.raises(UserError, match="must be an http or https address"):
            load_settings(tmp_path / "bad.toml")
