"""Following `current`: a real server under load while releases change, and releases that cannot be used."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving import http, make_model
from test_reference import tiny_checkpoint

from edgekit.assistant.follow import Follower
from edgekit.errors import BudgetError


class Seen:
    """What a follower did."""

    def __init__(self, folder: Path) -> None:
        self.link, self.used, self.said = folder / "current", [], []
        self.broken: set[str] = set()
        for name in "abc":
            (folder / name).mkdir()
        self.point("a")
        self.follower: Follower[str] = Follower(
            self.link, folder / "a", opened=self.opened, use=self.used.append, say=self.said.append, every_s=0.01
        )

    def point(self, name: str) -> None:
        new = self.link.with_name("new")
        new.symlink_to(name)
        new.replace(self.link)

    def opened(self, folder: Path) -> str:
        if folder.name in self.broken:
            raise BudgetError("it does not fit")
        return folder.name


def test_each_change_is_followed_once(tmp_path: Path) -> None:
    seen = Seen(tmp_path)
    for name in "aabbbca":
        seen.point(name)
        seen.follower.look()
    assert seen.used == ["b", "c", "a"]
    assert seen.follower.release == tmp_path / "a"


def test_a_release_that_cannot_be_used_is_said_once_and_the_old_one_stays(tmp_path: Path) -> None:
    seen = Seen(tmp_path)
    seen.broken = {"b"}
    for name in "bbb":
        seen.point(name)
        seen.follower.look()
    assert (seen.used, seen.follower.release.name) == ([], "a")
    assert seen.said == ["still a: b cannot be used: it does not fit"]
    seen.link.unlink()
    seen.follower.look()  # a store that was taken away
    seen.link.symlink_to("a")
    seen.follower.look()
    assert seen.used == []
    seen.point("c")
    seen.follower.look()
    assert seen.used == ["c"]


def test_the_thread_looks_by_itself_and_ends(tmp_path: Path) -> None:
    seen = Seen(tmp_path)
    with seen.follower:
        seen.point("b")
        wait_for(lambda: seen.used == ["b"])
    seen.point("c")
    time.sleep(0.05)
    assert seen.used == ["b"]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_server_goes_over_without_dropping_a_request(tmp_path: Path) -> None:
    from serving import listening
    from test_store import well

    from edgekit.assistant.queue import Line
    from edgekit.assistant.server import App, Settings, guarded
    from edgekit.deploy.store import Store
    from edgekit.export.export import export
    from edgekit.export.targets import TARGETS

    endless = {"eos_token_id": None, "max_position_embeddings": 2048}
    for name, seed in (("one", 0), ("two", 7)):
        export(tiny_checkpoint(seed=seed, config=endless), tmp_path / name, target=TARGETS["portable"])
    store = Store(tmp_path / "store")
    ids = [store.deploy(tmp_path / "one", check=well)]
    link = store.path / "current"

    def opened(folder: Path) -> Any:
        return make_model(folder, name="current", max_tokens=2000)

    def ask(**options: Any) -> Any:
        body = json.dumps({"model": "current", "prompt": "The quick", "temperature": 0, **options}).encode()
        return http(port, "POST", "/v1/completions", headers=[*host, ("Content-Type", "application/json")], body=body)

    answers: list[Any] = []
    end = threading.Event()

    def client() -> None:
        while not end.is_set():
            answers.append(ask(max_tokens=4))

    with Line(waiting=32) as line:
        app = App(opened(link.resolve()), line, None, Settings())
        with listening(guarded(app)) as port:
            host = [("Host", f"127.0.0.1:{port}")]
            before = json.loads(ask(max_tokens=4).body)["choices"][0]["text"]
            long: list[Any] = []
            slow = threading.Thread(target=lambda: long.append(ask(max_tokens=600)))
            clients = [threading.Thread(target=client) for _ in range(3)]
            with Follower(
                link, link.resolve(), opened=opened, use=lambda m: setattr(app, "model", m), say=print, every_s=0.01
            ):
                slow.start()
                wait_for(lambda: line.busy)
                for thread in clients:
                    thread.start()
                ids.append(store.deploy(tmp_path / "two", check=well))
                wait_for(lambda: app.model.session.bundle.path.name == ids[1])
                slow.join()
                wait_for(lambda: len(answers) >= 12)
                store.rollback(check=well)
                wait_for(lambda: app.model.session.bundle.path.name == ids[0])
                seen = len(answers)
                wait_for(lambda: len(answers) >= seen + 12)
                end.set()
                for thread in clients:
                    thread.join()
    assert [answer.status for answer in (*answers, *long)] == [200] * (len(answers) + 1)
    texts = [json.loads(answer.body)["choices"][0]["text"] for answer in answers]
    assert set(texts[-4:]) == {before}
    assert len(set(texts)) == 2, "both releases answered"
    assert json.loads(long[0].body)["usage"]["completion_tokens"] == 600
    assert json.loads(long[0].body)["choices"][0]["text"].startswith(before)
