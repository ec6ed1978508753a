"""Folders: whole or absent, only ours replaced, paths that stay inside, refusals of the system explained."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import BudgetError, EdgekitError, ModelError, UserError
from edgekit.folder import digest, explain_write_errors, inside, new_folder, write_file


def fill(folder: Path, text: str = "new") -> None:
    (folder / "edgekit.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_text(text)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as work:
        fill(work)
        assert not target.exists()
        assert work.parent == target.parent
    assert listing(tmp_path) == ["out", "out/edgekit.json", "out/sub", "out/sub/data"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead, alive = subprocess.Popen(["true"]), os.getppid()
    dead.wait()
    left = tmp_path / f".out[1].{dead.pid}.partial"
    others = [tmp_path / name for name in (f".out[1].{alive}.partial", f".other.{dead.pid}.partial", ".out[1].partial")]
    for folder in (left, *others):
        folder.mkdir()
    with new_folder(tmp_path / "out[1]"):
        assert not left.exists()
    assert all(folder.is_dir() for folder in others)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b" / "out") as work:
        fill(work)
    assert (tmp_path / "a" / "b" / "out" / "edgekit.json").exists()


@pytest.mark.parametrize("problem", [ValueError("x"), ModelError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_raised_inside_leaves_nothing(tmp_path: Path, problem: BaseException) -> None:
    with pytest.raises(type(problem)), new_folder(tmp_path / "out") as work:  # noqa: PT012
        fill(work)
        raise problem
    assert listing(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as work:
        fill(work, "old")
    with pytest.raises(ValueError, match="x"), new_folder(tmp_path / "out", force=True) as work:  # noqa: PT012
        fill(work)
        raise ValueError("x")
    assert (tmp_path / "out" / "sub" / "data").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "out") as work:
        fill(work, "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="must be writable"), new_folder(tmp_path / "out", force=True) as work:
        fill(work)
    assert (tmp_path / "out" / "sub" / "data").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = Path.rename

    def record_sync(path: Path) -> None:
        events.append(path.name)

    def record_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr("edgekit.folder.sync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with new_folder(tmp_path / "out") as work:
        fill(work)
        name = work.name
    at = events.index("rename")
    assert sorted(events[:at]) == sorted(["edgekit.json", "sub", "data", name])
    assert events[at + 1 :] == [tmp_path.name]


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = False
    with pytest.raises(UserError, match=r"must not exist.*--force"), new_folder(tmp_path / "out"):
        ran = True
    assert not ran


def test_an_output_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must not exist"), new_folder(tmp_path / "out") as work:  # noqa: PT012
        fill(work)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("kept")
    assert listing(tmp_path) == ["out", "out/theirs"]


def a_file(path: Path) -> None:
    path.write_text("mine")


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def a_link_to_ours(path: Path) -> None:
    with new_folder(path.with_name("elsewhere")) as work:
        fill(work)
    path.symlink_to(path.with_name("elsewhere"))


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [a_file, foreign_folder, a_link_to_ours, a_dangling_link])
def test_force_replaces_only_our_own_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    before = listing(tmp_path)
    refusal = pytest.raises(UserError, match=r"only folders that edgekit wrote|must not be a link")
    with refusal, new_folder(tmp_path / "out", force=True) as work:
        fill(work)
    assert listing(tmp_path) == before


def test_force_replaces_ours_and_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for text in ("one", "two"):
        with new_folder(tmp_path / "out", force=True) as work:
            fill(work, text)
        assert (tmp_path / "out" / "sub" / "data").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_present_folder_can_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with new_folder(Path(), force=True) as work:
        fill(work)
    assert listing(tmp_path / "out") == ["edgekit.json", "sub", "sub/data"]


def test_write_file_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a", b"new")
    assert listing(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, BudgetError, "the disk is full: writing out failed"),
        (errno.EDQUOT, BudgetError, "the disk is full"),
        (errno.EACCES, UserError, "the output must be writable: out .Permission denied"),
        (errno.EROFS, UserError, "must be writable.*Read-only"),
        (errno.ENOTDIR, UserError, "must be writable"),
        (errno.ENAMETOOLONG, UserError, "must be writable"),
    ],
)
def test_refusals_of_the_system_are_explained(number: int, error: type[EdgekitError], message: str) -> None:
    with pytest.raises(error, match=message), explain_write_errors(Path("out")):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_the_system_pass() -> None:
    with pytest.raises(OSError, match="Input/output"), explain_write_errors(Path("out")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "x" * 250])
def test_outputs_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="must be writable"), new_folder(tmp_path / name) as work:
        fill(work)
    assert listing(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="must be writable"), new_folder(tmp_path / "out") as work:
        fill(work)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("relative", ["a", "sub/a", "a.b-c_d", "sub/./a", "...", "ünï/模型"])
def test_plain_paths_are_inside(tmp_path: Path, relative: str) -> None:
    assert inside(tmp_path, relative) == tmp_path / relative


@pytest.mark.parametrize(
    "relative",
    ["", "/etc/passwd", "..", "../a", "sub/../../a", "sub/..", "a\\b", "..\\a", "C:/a", "C:a", "a\0b", "//host/a"],
)
def test_paths_that_leave_are_refused(tmp_path: Path, relative: str) -> None:
    with pytest.raises(ModelError, match="must stay inside its folder"):
        inside(tmp_path, relative)


def test_links_may_lead_inside_but_not_outside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_text("a")
    (root / "good").symlink_to("a")
    (root / "bad").symlink_to(tmp_path)
    (root / "worse").symlink_to("/etc/passwd")
    assert inside(root, "good") == root / "good"
    for relative in ("bad", "bad/file", "worse"):
        with pytest.raises(ModelError, match="is a link that leads outside"):
            inside(root, relative)


def test_a_root_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    assert inside(tmp_path / "link", "a") == tmp_path / "link" / "a"


@pytest.mark.parametrize("relative", ["loop", "loop/a", "\ud800"])
def test_paths_that_lead_nowhere(tmp_path: Path, relative: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelError, match=r"must lead to a file|must stay inside"):
        inside(tmp_path, relative)


@given(st.text(max_size=40))
def test_whatever_is_accepted_is_inside(relative: str) -> None:
    root = Path("/root-of-a-bundle")
    try:
        path = inside(root, relative)
    except ModelError:
        return
    assert os.path.normpath(path).startswith(str(root))
