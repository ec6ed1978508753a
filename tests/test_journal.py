"""Runs that are killed: at any moment, they go on to the same bytes; and what a work folder is refused for."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_folder

import edgekit.compress as runner
import edgekit.journal as journal_module
from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import EdgekitError, UserError
from edgekit.job import Progress
from edgekit.journal import Journal, locked_work_folder
from edgekit.manifest import Manifest
from edgekit.model.sources import open_model
from edgekit.quant.rotate import Rotate
from edgekit.quant.rounding import Int4
from edgekit.recipe import Recipe, load_recipe

INT4 = load_recipe("int4")
ROTATED = Recipe("rotated", "", (Rotate(), Int4(skip=("*.0.mlp.down_proj",))), seed=5)
BLOCKS = 5  # embedding, three layers, final


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("source") / "model", layers=3)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run with ROTATED writes."""
    output = tmp_path_factory.mktemp("whole") / "small"
    compress(open_model(str(model)), ROTATED, output)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, whose times differ from run to run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "edgekit.json"}


def timeless(manifest: Manifest) -> Manifest:
    steps = tuple(dataclasses.replace(step, seconds=0.0, peak_memory_bytes=0) for step in manifest.steps)
    return dataclasses.replace(manifest, steps=steps, created="")


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(count: int, name: str, first: Callable[..., Any], module: Any = runner) -> None:
    """Replace `module.name` so that its `count`-th call does `first(original, *arguments)` and is then killed."""
    original, calls = getattr(module, name), []

    def replaced(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            first(original, *arguments, **named)
            die()
        return original(*arguments, **named)

    setattr(module, name, replaced)


def torn(original: Callable[..., Any], path: Path, *arguments: Any) -> None:
    """Write a whole file, then cut it in half."""
    original(path, *arguments)
    os.truncate(path, path.stat().st_size // 2)


def nothing(*_: object, **__: object) -> None:
    pass


def in_full(original: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    original(*arguments, **named)


KILLS: dict[str, tuple[int, Callable[[], None]]] = {  # name -> blocks that are safe then, how to be killed there
    "while the first shard is written": (0, lambda: at_call(1, "write_block", torn)),
    "while the third shard is written": (2, lambda: at_call(3, "write_block", torn)),
    "after a shard, before it is on disk": (1, lambda: at_call(2, "write_block", in_full)),
    "before a shard is in the journal": (3, lambda: at_call(4, "save", nothing, Journal)),
    "while the journal is written": (
        2,
        lambda: at_call(
            3, "write_file", lambda _, path, data: path.with_name("journal.json.partial").write_bytes(data[:50]),
            journal_module,
        ),
    ),
    "after the journal": (2, lambda: at_call(2, "write_file", in_full, journal_module)),
    "after the last block": (5, lambda: at_call(1, "_finish", nothing)),
    "while the frame is written": (5, lambda: at_call(1, "write_frame", in_full)),
    "before the manifest": (5, lambda: at_call(1, "save", nothing, Manifest)),
    "before the rename": (5, lambda: at_call(1, "publish", nothing)),
}  # fmt: skip


def killed(prepare: Callable[[], None], model: Path, recipe: Recipe, output: Path, **options: Any) -> None:
    """Compress in a child process that `prepare` arranges to be killed."""

    def child() -> None:
        prepare()
        compress(open_model(str(model)), recipe, output, **options)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(moment: str, model: Path, whole: Path, tmp_path: Path) -> None:
    safe, prepare = KILLS[moment]
    output = tmp_path / "small"
    killed(prepare, model, ROTATED, output)
    assert not output.exists()
    assert partial(output).exists()
    if safe:
        with pytest.raises(UserError, match=f"stopped after block {safe} of {BLOCKS} .*--resume .*--force"):
            compress(open_model(str(model)), ROTATED, output)
    events: list[Progress] = []
    manifest = compress(open_model(str(model)), ROTATED, output, resume=True, on_progress=events.append)
    assert [event.done for event in events] == list(range(safe + 1, BLOCKS + 1))
    assert contents(output) == contents(whole)
    assert timeless(manifest) == timeless(Manifest.load(whole))
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_run_killed_over_and_over_a_little_later_each_time_ends_with_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    for milliseconds in itertools.count(1):
        process = multiprocessing.get_context("fork").Process(
            target=lambda: compress(open_model(str(model)), ROTATED, output, resume=True)
        )
        process.start()
        time.sleep(milliseconds / 1000)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if output.exists():
            break
    open_checkpoint(output)
    written = contents(output)
    written.pop("journal.json", None)  # there when the kill fell between the rename and its removal
    assert written == contents(whole)


def test_a_run_killed_while_it_replaces_an_output_leaves_the_old_one(model: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    compress(open_model(str(model)), INT4, output)
    old = contents(output)
    killed(lambda: at_call(1, "publish", nothing), model, ROTATED, output, force=True)
    assert contents(output) == old
    with pytest.raises(UserError, match="output must not exist"):
        compress(open_model(str(model)), ROTATED, output, resume=True)
    compress(open_model(str(model)), ROTATED, output, resume=True, force=True)
    assert contents(output) == contents(whole)


@pytest.fixture
def stopped(model: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed after three blocks."""
    output = tmp_path / "small"
    killed(lambda: at_call(4, "write_block", torn), model, ROTATED, output)
    return output


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_finished_shard_that_lost_its_bytes_is_written_again(
    damage: str, stopped: Path, model: Path, whole: Path
) -> None:
    shard = partial(stopped) / f"model-00002-of-{BLOCKS:05}.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "changed" else data[:-100])
    blocks: list[str] = []
    compress(open_model(str(model)), ROTATED, stopped, resume=True, on_progress=lambda p: blocks.append(p.block))
    assert blocks == ["layers.0", "layers.2", "final"]
    assert contents(stopped) == contents(whole)


def test_force_begins_again(stopped: Path, model: Path, whole: Path) -> None:
    blocks: list[str] = []
    compress(open_model(str(model)), ROTATED, stopped, force=True, on_progress=lambda p: blocks.append(p.block))
    assert len(blocks) == BLOCKS
    assert contents(stopped) == contents(whole)


def test_resume_begins_where_there_is_nothing_to_go_on_with(model: Path, whole: Path, tmp_path: Path) -> None:
    compress(open_model(str(model)), ROTATED, tmp_path / "small", resume=True)
    assert contents(tmp_path / "small") == contents(whole)


def test_another_recipe_source_or_version_cannot_be_resumed(
    stopped: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in partial(stopped).iterdir()}
    other = tiny_folder(tmp_path / "other", layers=3, seed=1)
    reseeded = dataclasses.replace(ROTATED, seed=6)
    with pytest.raises(UserError, match="the recipe changed"):
        compress(open_model(str(model)), reseeded, stopped, resume=True)
    with pytest.raises(UserError, match="the source model changed"):
        compress(open_model(str(other)), ROTATED, stopped, resume=True)
    monkeypatch.setattr("edgekit.job._versions", lambda: {"edgekit": "9.9"})
    with pytest.raises(UserError, match=r"the versions \(edgekit 0.* -> 9.9, .*\) changed .*--force"):
        compress(open_model(str(model)), ROTATED, stopped, resume=True)
    assert {path.name: path.read_bytes() for path in partial(stopped).iterdir()} == before
    assert not stopped.exists()


def test_two_compressed_sources_of_one_model_are_told_apart(model: Path, tmp_path: Path) -> None:
    for name, recipe in (("four", INT4), ("eight", load_recipe("int8"))):
        compress(open_model(str(model)), recipe, tmp_path / name)
    output = tmp_path / "small"
    killed(lambda: at_call(3, "write_block", torn), tmp_path / "four", ROTATED, output)
    with pytest.raises(UserError, match="the source model changed"):
        compress(open_model(str(tmp_path / "eight")), ROTATED, output, resume=True)


def test_one_process_at_a_time(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    with locked_work_folder(output) as work:
        (work / "shard").write_bytes(b"the other's")
        with pytest.raises(UserError, match=r"one run at a time .*another is writing .*small"):
            compress(open_model(str(model)), ROTATED, output, force=True)
        assert (work / "shard").read_bytes() == b"the other's"
    assert not partial(output).exists()
    compress(open_model(str(model)), ROTATED, output)


@pytest.mark.parametrize("text", ["{", "[]", '{"identity": 1}', "\xff"])
def test_a_broken_journal_is_not_trusted(text: str, stopped: Path, model: Path, whole: Path) -> None:
    (partial(stopped) / "journal.json").write_text(text, encoding="latin-1")
    for resume in (True, False):
        with pytest.raises(EdgekitError, match=r"journal\.json"):
            compress(open_model(str(model)), ROTATED, stopped, resume=resume)
    compress(open_model(str(model)), ROTATED, stopped, force=True)
    assert contents(stopped) == contents(whole)
