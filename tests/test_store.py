"""The store: killed at every step, a full disk, forged and damaged bundles, and the way back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.bundle import MODEL, SPEC, WEIGHTS
from edgekit.deploy import store as module
from edgekit.deploy.health import command
from edgekit.deploy.signing import SIGNATURE, new_key, sign, verify
from edgekit.deploy.store import Store
from edgekit.errors import BudgetError, DeviceError, ModelError, UserError
from edgekit.manifest import NAME, Manifest, SourceRecord, record_files


def make_bundle(folder: Path, text: str, *, weights: str = "the same weights") -> Path:
    """A folder that is a bundle as far as a store can tell."""
    folder.mkdir(parents=True)
    (folder / MODEL).write_text(text)
    (folder / WEIGHTS).write_text(weights)
    (folder / SPEC).write_text("{}")
    names = [MODEL, WEIGHTS, SPEC]
    Manifest(kind="bundle", source=SourceRecord("x", "folder", "0"), files=record_files(folder, names)).save(folder)
    return folder


def well(folder: Path) -> None:
    """A check that all bundles pass."""


def ill(folder: Path) -> None:
    raise DeviceError("it does not answer")


def steps_of(bundle: Path, store: Path) -> list[str]:
    seen: list[str] = []
    Store(store).deploy(bundle, check=well, health=well, watch=seen.append)
    return seen


def is_whole(store: Path) -> str:
    current = Store(store).current()
    assert current is not None
    Manifest.load(current)
    return (current / MODEL).read_text()


KILL = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_store import well
from edgekit.deploy.store import Store

def watch(step):
    if step == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)

Store(Path({store!r})).deploy(Path({bundle!r}), check=well, health=well, watch=watch)
"""

STEPS = ["verify", f"copy {MODEL}", f"copy {WEIGHTS}", f"copy {SPEC}", "release", "publish", "check"]
STEPS += ["trial", "switch", "health", "note", "done"]


def test_the_table_names_all_steps(tmp_path: Path) -> None:
    assert sorted(steps_of(make_bundle(tmp_path / "a", "a"), tmp_path / "store")) == sorted(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_current_is_whole(step: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = make_bundle(tmp_path / "a", "a"), make_bundle(tmp_path / "b", "b", weights="others")
    Store(store).deploy(first, check=well)
    code = KILL.format(tests=str(Path(__file__).parent), step=step, store=str(store), bundle=str(second))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert is_whole(store) in ("a", "b")
    Store(store).collect(keep=2)  # any command ends the killed one first
    assert is_whole(store) == ("b" if step == "done" else "a")
    Store(store).deploy(second, check=well)
    assert is_whole(store) == "b"
    assert not list((store / "releases").glob(".*"))


def interrupted(store: Path, bundle: Path, step: str) -> None:
    """Break off at a step without any of our own tidying but the lock's: what a kill leaves, in this process."""

    def watch(seen: str) -> None:
        if seen == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(store).deploy(bundle, check=well, health=well, watch=watch)


@pytest.mark.parametrize("step", STEPS)
def test_broken_off_at_any_step_current_is_whole(step: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    Store(store).deploy(make_bundle(tmp_path / "a", "a"), check=well)
    interrupted(store, make_bundle(tmp_path / "b", "b", weights="others"), step)
    assert is_whole(store) in ("a", "b")
    Store(store).collect(keep=2)
    assert is_whole(store) == ("b" if step == "done" else "a")


def test_equal_files_are_stored_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("a", "b"):
        Store(store).deploy(make_bundle(tmp_path / name, name), check=well)
    folders = list((store / "releases").iterdir())
    assert len({(folder / WEIGHTS).stat().st_ino for folder in folders}) == 1
    assert len(folders) == 2


def test_a_release_that_fails_its_health_check_is_left_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(DeviceError):
        store.deploy(make_bundle(tmp_path / "zero", "0"), check=well, health=ill)
    assert store.current() is None
    store.deploy(make_bundle(tmp_path / "a", "a"), check=well)
    second = make_bundle(tmp_path / "b", "b")
    for check, health in ((ill, well), (well, ill), (well, command("false", seconds=5))):
        with pytest.raises(DeviceError):
            store.deploy(second, check=check, health=health)
        assert is_whole(store.path) == "a"
    assert [event.event for event in store.history()][-2:] == ["trial", "failed"]
    store.deploy(second, check=well, health=command("test -f model.onnx -o -d .", seconds=5))
    assert is_whole(store.path) == "b"


@pytest.mark.parametrize(
    ("line", "message"), [("no-such-program", "must be a program"), ("sleep 5", "must end within")]
)
def test_health_commands_that_cannot_say(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=message):
        command(line, seconds=0.1)(tmp_path)


def test_roll_back_and_history(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    ids = [store.deploy(make_bundle(tmp_path / name, name), check=well) for name in "abc"]
    assert store.rollback(check=well) == ids[1]
    assert is_whole(store.path) == "b"
    assert store.rollback(ids[0][:10], check=well) == ids[0]
    with pytest.raises(UserError, match="the beginning of one id"):
        store.rollback("zz", check=well)
    done = [event.release for event in store.history() if event.event in ("deployed", "rolled back")]
    assert done == [*ids, ids[1], ids[0]]
    with (store.path / "history.jsonl").open("a") as stream:
        stream.write('{"at": "torn')
    assert len(store.history()) == 2 * len(done)
    store.rollback(check=well)
    assert all(json.loads(line) for line in (store.path / "history.jsonl").read_text().splitlines())


def test_collecting_leaves_what_is_current(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    ids = [store.deploy(make_bundle(tmp_path / n, n, weights=f"of {n}"), check=well) for n in "abc"]
    store.rollback(ids[0], check=well)
    assert set(store.collect(keep=1)) == {ids[1], ids[2]}
    assert is_whole(store.path) == "a"
    assert len(list((store.path / "objects").glob("*/*"))) == 3
    with pytest.raises(UserError, match="an earlier release"):
        store.rollback(check=well)


def tamper_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_text("evil weights!!!!")


def tamper_and_relist(folder: Path) -> None:
    tamper_weights(folder)
    manifest = Manifest.load(folder, verify=False)
    files = record_files(folder, manifest.files)
    Manifest(kind="bundle", source=manifest.source, files=files).save(folder)


def unsign(folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def garble(folder: Path) -> None:
    (folder / SIGNATURE).write_text('{"algorithm": "none", "signature": ""}')


def by_another(folder: Path) -> None:
    new_key(folder.parent / "other.pem", folder.parent / "other.pub")
    sign(folder, folder.parent / "other.pem")


@pytest.mark.parametrize("attack", [tamper_weights, tamper_and_relist, unsign, garble, by_another])
def test_where_keys_are_set_only_what_they_signed_goes_in(attack: Callable[[Path], None], tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    store = Store(tmp_path / "store")
    new_key(tmp_path / "key.pem", tmp_path / "key.pub")
    store.trust(tmp_path / "key.pub")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    good, bad = make_bundle(tmp_path / "a", "a"), make_bundle(tmp_path / "b", "b")
    for folder in (good, bad):
        sign(folder, tmp_path / "key.pem")
    store.deploy(good, check=well)
    attack(bad)
    with pytest.raises(ModelError):
        store.deploy(bad, check=well)
    assert is_whole(store.path) == "a"
    current = store.current()
    assert current is not None
    assert verify(current, store.keys())


def test_a_release_that_was_changed_in_the_store_is_not_gone_back_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = store.deploy(make_bundle(tmp_path / "a", "a"), check=well)
    store.deploy(make_bundle(tmp_path / "b", "b"), check=well)
    path = store.path / "releases" / first / MODEL
    path.chmod(0o644)
    path.write_text("z")
    with pytest.raises(ModelError, match="differs from its digest"):
        store.rollback(check=well)
    assert is_whole(store.path) == "b"
    store.deploy(tmp_path / "a", check=well)  # the damaged object is replaced
    assert is_whole(store.path) == "a"


@pytest.mark.parametrize("call", ["fsync", "link", "symlink"])
def test_a_full_disk_keeps_the_old_release(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    store.deploy(make_bundle(tmp_path / "a", "a"), check=well)
    second = make_bundle(tmp_path / "b", "b", weights="others")

    def full(*words: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(BudgetError, match="the disk is full"):
            store.deploy(second, check=well)
    assert is_whole(store.path) == "a"
    store.deploy(second, check=well)
    assert is_whole(store.path) == "b"


def test_two_deployments_at_once_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    bundle = make_bundle(tmp_path / "a", "a")

    def second(folder: Path) -> None:
        store.collect()

    with pytest.raises(UserError, match="one deployment at a time"):
        store.deploy(bundle, check=second)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "a", "a")
    data = json.loads((folder / NAME).read_text())
    data["files"]["../../escape"] = data["files"][MODEL]
    (folder / NAME).write_text(json.dumps(data))
    with pytest.raises(ModelError, match="stay inside"):
        Store(tmp_path / "store").deploy(folder, check=well)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="must hold"):
        Store(tmp_path / "store").deploy(folder, check=well)
    assert module.KEEP >= 2
