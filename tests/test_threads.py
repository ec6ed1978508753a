import json
from pathlib import Path

import pytest
from test_reference import tiny_checkpoint

from edgekit.bundle import Bundle
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile import latency
from edgekit.profile.threads import ThreadRates, best, sweep
from edgekit.runtime import threads
from edgekit.runtime.engine import Engine
from edgekit.runtime.session import Session
from edgekit.runtime.threads import keep, kept


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return Bundle.open(path)


def test_each_count_has_an_engine_of_its_own_and_they_take_turns(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    make = Engine.__init__
    monkeypatch.setattr(
        Engine,
        "__init__",
        lambda self, *a, threads, **o: (counts.append(threads), make(self, *a, threads=threads, **o))[1],
    )
    turns: list[int] = []
    monkeypatch.setattr(latency, "WAKE_S", 0)
    rates = sweep(bundle, [2, 1, 2], context=64, turns=2, on_turn=lambda: turns.append(1))
    assert counts == [1, 2] * 3
    assert [rate.threads for rate in rates] == [1, 2]
    assert all(rate.prefill > 0 and rate.decode > 0 for rate in rates)
    assert len(turns) == 6


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ([(1, 100, 50), (2, 190, 60), (4, 350, 48)], (4, 2)),
        ([(1, 100, 50), (2, 101, 50.5)], (1, 1)),
        ([(4, 10, 10)], (4, 4)),
    ],
)
def test_the_best_is_chosen_for_prefill_and_decode_apart(
    rates: list[tuple[int, float, float]], chosen: tuple[int, int]
) -> None:
    assert best([ThreadRates(*rate) for rate in rates]) == chosen


def test_what_was_found_is_kept_for_device_and_bundle(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept(bundle, folder=tmp_path) is None
    (tmp_path / "threads.json").write_text(json.dumps({"other": {"prefill": 3, "decode": 1}}))
    keep(bundle, 4, 2, folder=tmp_path)
    assert kept(bundle, folder=tmp_path) == (4, 2)
    assert "other" in json.loads((tmp_path / "threads.json").read_text())
    monkeypatch.setattr(threads, "host_device", lambda: type("D", (), {"fingerprint": lambda self: {"device": "x"}})())
    assert kept(bundle, folder=tmp_path) is None, "another machine"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"KEY": 5}', '{"KEY": {"prefill": 0, "decode": 1}}', '{"KEY": {"prefill": "2"}}']
)
def test_a_broken_file_is_as_none(text: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "threads.json").write_text(text.replace("KEY", threads._key(bundle)))
    assert kept(bundle, folder=tmp_path) is None
    keep(bundle, 2, 1, folder=tmp_path)
    assert kept(bundle, folder=tmp_path) == (2, 1)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", "/somewhere")
    assert threads.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("EDGEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert threads.cache_folder() == Path("/caches/edgekit")


def test_a_session_takes_what_was_kept_unless_it_is_told_otherwise(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    counts: list[tuple[int, int | None]] = []
    make = Engine.__init__

    def noting(self: Engine, *words, threads: int, decode_threads: int | None = None, **options) -> None:
        counts.append((threads, decode_threads))
        make(self, *words, threads=threads, decode_threads=decode_threads, **options)

    monkeypatch.setattr(Engine, "__init__", noting)
    keep(bundle, 2, 1)
    Session.open(bundle.path)
    Session.open(bundle.path, threads=3)
    assert counts == [(2, 1), (3, 3)]
