"""Kept caches: the same answers from disk as from the model, and nothing from a file that is not whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import needs_library
from serving import endless_bundle
from test_sparse_export import bundle as sparse_bundle  # noqa: F401  a fixture

from edgekit.errors import ContextOverflow, ModelError
from edgekit.runtime.prefix import Prefixes
from edgekit.runtime.session import Session

TEXT = "Every good test can fail. " * 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("prefix") / "bundle", context=256)


def fresh(path: Path) -> tuple[Session, list[int]]:
    session = Session.open(path, threads=1)
    return session, session.encode(TEXT)


def answer(session: Session) -> list[int]:
    generation = session.generate(TEXT + "And then?", max_tokens=12)
    generation.text()
    return generation.tokens


def test_read_once_then_from_disk_then_from_memory(path: Path, tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path / "kept")
    session, ids = fresh(path)
    expected = answer(session)
    session, ids = fresh(path)
    assert prefixes.read(session, ids) == "model"
    assert answer(session) == expected
    assert prefixes.read(session, ids) == "memory"
    again, _ = fresh(path)
    again.engine.forward(ids[5:30])  # another conversation
    assert prefixes.read(again, ids) == "disk"
    generation = again.generate(TEXT + "And then?", max_tokens=12)
    assert generation.text()
    assert generation.tokens == expected
    assert generation.reused_tokens >= len(ids) - 1
    (file,) = prefixes.folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert prefixes.folder.stat().st_mode & 0o077 == 0


@needs_library
def test_sparse_caches_keep_their_codes_and_means(sparse_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    prefixes = Prefixes(tmp_path)
    first, second = Session.open(sparse_bundle, threads=1), Session.open(sparse_bundle, threads=1)
    ids = first.encode("The quick brown fox jumps over the lazy dog. " * 14)
    assert 300 < len(ids) < 1000  # more than a block of codes, and not whole blocks
    assert prefixes.read(first, ids) == "model"
    assert prefixes.read(second, ids) == "disk"
    first.engine.forward(ids[:100])  # what the kept cache must not depend on
    first.engine.rewind(len(ids))
    for token in ids[:40]:
        np.testing.assert_array_equal(first.engine.forward([token]), second.engine.forward([token]))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_not_whole_is_removed_and_read_again(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    prefixes = Prefixes(tmp_path)
    session, ids = shared_session(path)
    session.engine.rewind(0)
    for file in tmp_path.iterdir():
        file.unlink()
    assert prefixes.read(session, ids) == "model"
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 400))
        broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    file.write_bytes(broken)
    session.engine.rewind(0)
    origin = prefixes.read(session, ids)
    assert session.engine.tokens == ids
    assert origin == "model" or broken_only_in_the_header(whole, broken)
    assert file.read_bytes() == whole or origin == "disk"


def broken_only_in_the_header(whole: bytes, broken: bytes) -> bool:
    """Spaces and the like: the header is not summed, and what it says is compared with the cache it goes to."""
    size = int.from_bytes(whole[8:12], "little")
    return len(whole) == len(broken) and whole[16 + size :] == broken[16 + size :]


_SESSIONS: dict[Path, tuple[Session, list[int]]] = {}


def shared_session(path: Path) -> tuple[Session, list[int]]:
    return _SESSIONS.setdefault(path, fresh(path))


def test_a_cache_is_of_its_bundle_alone(path: Path, tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path / "kept")
    session, ids = fresh(path)
    prefixes.read(session, ids)
    other = Session.open(endless_bundle(tmp_path / "other", context=128), threads=1)
    assert prefixes.read(other, ids) == "model"
    with pytest.raises(ModelError, match="of the same bundle"):
        other.engine.restore(ids[:3], session.engine.kept(4))
    assert other.engine.tokens == ids


def test_the_folder_is_bounded_and_the_oldest_goes(path: Path, tmp_path: Path) -> None:
    session, ids = fresh(path)
    Prefixes(tmp_path).read(session, ids)
    (first,) = tmp_path.iterdir()
    size = first.stat().st_size
    prefixes = Prefixes(tmp_path, limit_bytes=2 * size + 100)
    for at in (1, 2):
        os.utime(first, (0, 0))
        session.engine.rewind(0)
        assert prefixes.read(session, ids[:-at]) == "model"
    assert not first.exists()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * size + 100
    assert Prefixes(tmp_path / "none", limit_bytes=10).read(session, ids) == "model"
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_kept_is_read_all_the_same(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    session, ids = fresh(path)
    assert Prefixes(tmp_path / "file").read(session, ids) == "model"
    assert session.engine.tokens == ids


def test_no_room_and_a_stop(path: Path, tmp_path: Path) -> None:
    session, ids = fresh(path)
    with pytest.raises(ContextOverflow):
        Prefixes(tmp_path).read(session, ids * 9)
    session.go_on = lambda: False
    assert Prefixes(tmp_path).read(session, ids) == "stopped"
    assert list(tmp_path.iterdir()) == []
