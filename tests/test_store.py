"""The store: killed at every step, a full disk, forged and damaged bundles, and the way back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import MODEL, SPEC, WEIGHTS
from edgekit.deploy import store as module
from edgekit.deploy.health import command
from edgekit.deploy.signing import SIGNATURE, new_key, sign, verify
from edgekit.deploy.store import Store
from edgekit.errors import BudgetError, DeviceError, EdgekitError, ModelError, UserError
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


STEPS = ["verify", f"copy {MODEL}", f"copy {WEIGHTS}", f"copy {SPEC}", "release", "publish", "check"]
STEPS += ["trial", "switch", "health", "note", "done"]


def test_the_table_names_all_steps(tmp_path: Path) -> None:
    assert sorted(steps_of(make_bundle(tmp_path / "a", "a"), tmp_path / "store")) == sorted(STEPS)


# --- faults at every change of the disk -------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NEEDS_ROOM = {"open", "os.link", "os.symlink", "os.mkdir", "write"}


def in_child(work: Callable[[], object], fault: Callable[[int, str], None]) -> tuple[int, int]:
    """Run `work` in a forked process in which `fault(number, event)` is called before every change of the disk.

    Returns how it ended (0 well, 1 with an error of ours, 2 with another, -9 killed) and how many changes there were.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES):
                os.write(writer, b".")
                seen += 1
                fault(seen, event)

        end = 2
        try:
            sys.addaudithook(hook)
            work()
            end = 0
        except EdgekitError:
            end = 1
        finally:
            os._exit(end)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        count = len(stream.read())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count


def killed_at(number: int) -> Callable[[int, str], None]:
    def fault(seen: int, event: str) -> None:
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def full_from(number: int) -> Callable[[int, str], None]:
    def fault(seen: int, event: str) -> None:
        if seen >= number and event in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fault


def never(seen: int, event: str) -> None:
    pass


class Scene:
    """A store with releases `a` and `z`, `a` current, and what shall be done to it: afterwards `after` is current."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.after = {"deploy": "b", "again": "z", "rollback": "z", "collect": "a"}[name]
        for text in "zab":
            make_bundle(folder / text, text, weights=f"of {text}")
        for text in "za":
            Store(folder / "template").deploy(folder / text, check=well)

    def fresh(self, path: Path) -> Store:
        subprocess.run(["cp", "--archive", self.folder / "template", path], check=True)  # links stay links
        return Store(path)

    def work(self, store: Store) -> Callable[[], object]:
        return {
            "deploy": lambda: store.deploy(self.folder / "b", check=well, health=well),
            "again": lambda: store.deploy(self.folder / "z", check=well, health=well),
            "rollback": lambda: store.rollback(check=well, health=well),
            "collect": lambda: store.collect(keep=1),
        }[self.name]


SCENES = ["deploy", "again", "rollback", "collect"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flushing: what a killed process wrote is there, only a power cut takes it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SCENES)
def test_killed_before_any_change_of_the_disk_current_is_whole(name: str, tmp_path: Path) -> None:
    """kill -9 before the first change, the second, and so on; then another command, and the same one again."""
    scene = Scene(tmp_path, name)
    ended, changes = in_child(scene.work(scene.fresh(tmp_path / "well")), never)
    assert ended == 0
    assert is_whole(tmp_path / "well") == scene.after
    assert changes > 5
    for number in range(1, changes + 1):
        store = scene.fresh(tmp_path / f"killed {number}")
        assert in_child(scene.work(store), killed_at(number)) == (-9, number)
        assert is_whole(store.path) in ("a", scene.after)
        store.collect(keep=3)  # any command brings the killed one to its end first
        done = sum(event.event in ("deployed", "rolled back") for event in store.history()) > 2
        assert is_whole(store.path) == (scene.after if done else "a")
        if not done:
            scene.work(store)()
            assert is_whole(store.path) == scene.after
        assert not list((store.path / "releases").glob(".*"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SCENES)
def test_a_disk_that_is_full_from_any_change_on_keeps_the_old_release(name: str, tmp_path: Path) -> None:
    scene = Scene(tmp_path, name)
    _, changes = in_child(scene.work(scene.fresh(tmp_path / "well")), never)
    failed = 0
    for number in range(1, changes + 1):
        store = scene.fresh(tmp_path / f"full {number}")
        ended, _ = in_child(scene.work(store), full_from(number))
        assert ended in (0, 1)
        failed += ended
        assert is_whole(store.path) == ("a" if ended else scene.after)
        if ended:
            scene.work(store)()
            assert is_whole(store.path) == scene.after
    assert failed > 0


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
