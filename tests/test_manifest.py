"""The manifest: round trip, verification of every file, and folders that are not ours, not whole or hostile."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import ModelError
from edgekit.manifest import (
    NAME,
    SCHEMA,
    FileRecord,
    Manifest,
    Skip,
    SourceRecord,
    StepRecord,
    now,
    record_files,
    versions,
)
from edgekit.report import Measurement


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder with a manifest of all that a manifest can say."""
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("weights")
    Manifest(
        kind="checkpoint",
        source=SourceRecord("tïny", "gguf", "d" * 64, "apache-2.0"),
        files=record_files(tmp_path, ["sub/b.txt", "a.bin"]),
        recipe="int4",
        recipe_sha256="e" * 64,
        seed=3,
        steps=(
            StepRecord(
                "quant.int4", {"block": 32, "skip": ["lm_head"]}, 5, 100, 20, {"error": 0.5}, (Skip("x", "y"),), 1.5, 7
            ),
        ),
        measurements=(Measurement("kl", 0.25, "nat", spread=0.1), Measurement("power", None, "W", note="no sensor")),
        versions=versions("numpy", "no-such-package"),
        created=now(),
    ).save(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON in place."""
    data = json.loads((folder / NAME).read_text())
    change(data)
    (folder / NAME).write_text(json.dumps(data))


def test_what_is_saved_is_loaded(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.source.name == "tïny"
    assert list(manifest.files) == ["a.bin", "sub/b.txt"]
    assert manifest.files["a.bin"].size_bytes == 3
    assert manifest.steps[0].skipped == (Skip("x", "y"),)
    assert {"edgekit", "python", "numpy"} == manifest.versions.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest.created)
    assert manifest.schema == SCHEMA
    (folder / "copy").mkdir()
    manifest.save(folder / "copy")
    assert (folder / "copy" / NAME).read_bytes() == (folder / NAME).read_bytes()
    assert Manifest.load(folder / "copy", verify=False) == manifest


def test_unlisted_files_are_no_concern(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    Manifest.load(folder)


def flipped(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"\0\1\3")


def cut(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"\0\1")


def grown(folder: Path) -> None:
    (folder / "sub" / "b.txt").write_text("weights ")


def removed(folder: Path) -> None:
    (folder / "a.bin").unlink()


def a_folder_instead(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()


def a_link_outside(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("/etc/hostname")


def a_loop(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("a.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, r"a\.bin differs from its digest"),
        (cut, r"a\.bin differs from its digest"),
        (grown, r"b\.txt differs from its digest"),
        (removed, r"lacks a\.bin, which its edgekit\.json lists"),
        (a_folder_instead, r"lacks a\.bin"),
        (a_link_outside, r"a\.bin.*leads outside"),
        (a_loop, r"a\.bin.*does not"),
    ],
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        Manifest.load(folder)
    Manifest.load(folder, verify=False)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a\\b", "sub/../../x", "", "a\0", "\ud800"])
def test_paths_that_escape(folder: Path, name: str) -> None:
    edit(folder, lambda data: data["files"].update({name: {"size_bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(ModelError, match=r"must stay inside|must lead to a file|lacks"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a.bin/x", ".", "sub"])
def test_paths_that_are_no_files(folder: Path, name: str) -> None:
    edit(folder, lambda data: data["files"].update({name: {"size_bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(ModelError, match=r"lacks|must be readable"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be readable JSON"),
        (b"{", "must be readable JSON"),
        (b"\xff\xfe{}", "must be readable JSON"),
        (b"[" * 100_000, "must be readable JSON"),
        (b"9" * 10_000, "must be readable JSON"),
        (b"[]", "must be a table"),
        (b"null", "must be a table"),
        (b"{}", "the key 'kind' is missing"),
        (b'{"schema": 99, "from": "the future"}', "has schema 99, this edgekit .* reads up to 1; update edgekit"),
        (b'{"schema": "1"}', "the key 'kind' is missing|schema must be an integer"),
    ],
)
def test_what_is_no_manifest(folder: Path, content: bytes, message: str) -> None:
    (folder / NAME).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Manifest.load(folder)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold edgekit\.json"):
        Manifest.load(tmp_path)
    (tmp_path / NAME).mkdir()
    with pytest.raises(ModelError, match="must be readable JSON"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(kind="virus"), "kind must be one of checkpoint, bundle, onnx: got 'virus'"),
        (lambda data: data.update(sed=1), "unknown key 'sed'; did you mean 'seed'"),
        (lambda data: data["files"]["a.bin"].pop("sha256"), r"files\.a\.bin: the key 'sha256' is missing"),
        (lambda data: data["files"].update(x="y"), r"files\.x must be a table"),
        (lambda data: data["source"].update(name=3), "source: name must be a string"),
        (lambda data: data["steps"][0].update(changed="5"), r"steps\[0\]: changed must be an integer"),
        (lambda data: data["measurements"][0].update(how="guessed"), r"measurements\[0\]: how must be one of measured"),
        (lambda data: data.update(schema=True), "schema must be an integer"),
    ],
)
def test_wrong_entries_are_named(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(ModelError, match=message):
        Manifest.load(folder)


def test_records_know_sizes_and_digests(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    records = record_files(tmp_path, ["b", "a"])
    assert list(records) == ["a", "b"]
    assert records["b"] == FileRecord(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert dataclasses.asdict(records["a"])["size_bytes"] == 0
