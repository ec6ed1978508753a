"""The runner: what it writes and refuses, that nothing is half-written, and the dry run. Resuming: test_journal."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from tiny import tiny_folder, tiny_gguf

import edgekit.compress as runner
from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import BudgetError, ModelError, UserError
from edgekit.forecast import plan
from edgekit.job import Progress
from edgekit.manifest import Manifest
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.quant.rotate import Rotate
from edgekit.quant.rounding import Int4, Int8
from edgekit.recipe import Recipe, load_recipe
from edgekit.weight import Quantized

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


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_the_output_is_a_whole_checkpoint_that_says_how_it_came_to_be(model: Path, tmp_path: Path) -> None:
    source, output = open_model(str(model)), tmp_path / "deep" / "small"
    events: list[Progress] = []
    manifest = compress(source, INT4, output, on_progress=events.append)
    opened = open_checkpoint(output)  # verifies every digest

    assert opened.manifest == manifest
    assert set(manifest.files) == set(contents(output))
    assert (manifest.source, manifest.recipe, manifest.recipe_sha256) == (source.source, "int4", INT4.sha256)
    assert {"edgekit", "numpy", "python"} <= manifest.versions.keys()
    assert load_recipe(output / "recipe.toml") == INT4
    assert opened.config == source.config
    assert dict(opened.assets) == dict(source.assets)
    assert "tokenizer.json" in opened.assets

    (record,) = manifest.steps
    assert (record.step, record.changed, record.skipped) == ("quant.int4", 22, ())
    assert record.before_bytes == sum(source.read_block(name).size_bytes for name in source.blocks)
    assert record.after_bytes == sum(opened.read_block(name).size_bytes for name in opened.blocks)
    assert 0.01 < record.facts["relative_error"] < 0.1
    assert record.peak_memory_bytes > 10e6

    assert [event.done for event in events] == [1, 2, 3, 4, 5]
    assert [event.block for event in events] == ["embedding", "layers.0", "layers.1", "layers.2", "final"]
    assert {event.total for event in events} == {BLOCKS}
    assert [p.name for p in output.parent.iterdir()] == ["small"]


def test_the_weights_are_those_that_the_steps_give(model: Path, tmp_path: Path) -> None:
    source, output = open_model(str(model)), tmp_path / "small"
    compress(source, INT4, output)
    opened = open_checkpoint(output)
    assert set(opened.structure) == {m for modules, _ in source.blocks.values() for m in modules}
    for module, grid in (
        ("model.embed_tokens", Grid(8, 32, "symmetric")),
        ("model.layers.2.mlp.down_proj", Grid(4, 32, "zero")),
    ):
        expected, written = round_to_grid(source.weight(module).dense(), grid, where=module), opened.weight(module)
        assert isinstance(written, Quantized)
        np.testing.assert_array_equal(written.codes, expected.codes)
        np.testing.assert_array_equal(written.scales, expected.scales)
        np.testing.assert_array_equal(written.zeros, expected.zeros)
    before, after = forward(source, [[1, 2, 3]])[0], forward(opened, [[1, 2, 3]])[0]
    assert 0.001 < np.abs(after - before).mean() < 0.5


def test_the_same_input_gives_the_same_bytes(model: Path, whole: Path, tmp_path: Path) -> None:
    compress(open_model(str(model)), ROTATED, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)
    assert timeless(Manifest.load(tmp_path / "again")) == timeless(Manifest.load(whole))


@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_tied_table_is_stored_once(tmp_path: Path, stored_twice: bool) -> None:
    folder = tiny_folder(tmp_path / "model", tied=True)
    if stored_twice:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    compress(open_model(str(folder)), INT4, tmp_path / "small")
    opened = open_checkpoint(tmp_path / "small")
    assert not opened.has("lm_head")
    assert "model.embed_tokens" in opened.structure
    assert plan(open_model(str(folder)), INT4).after_bytes == Manifest.load(tmp_path / "small").steps[0].after_bytes


def test_an_untied_head_is_rounded_too(tmp_path: Path) -> None:
    compress(open_model(str(tiny_folder(tmp_path / "model", tied=False))), INT4, tmp_path / "small")
    assert open_checkpoint(tmp_path / "small").structure["lm_head"].bits == 8


def test_a_gguf_file_compresses_like_its_folder(tmp_path: Path) -> None:
    folder, file = tiny_folder(tmp_path / "model"), tiny_gguf(tmp_path / "model.gguf")
    compress(open_model(str(folder)), INT4, tmp_path / "a")
    compress(open_model(str(file)), INT4, tmp_path / "b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in a if name.startswith("model-")} == {name for name in b if name.startswith("model-")}
    assert all(a[name] == b[name] for name in a if name.startswith("model-"))


def test_steps_accumulate_over_folders(model: Path, tmp_path: Path) -> None:
    compress(open_model(str(model)), INT4, tmp_path / "one")
    first = open_checkpoint(tmp_path / "one")
    manifest = compress(first, Recipe("eight", "", (Int8(),)), tmp_path / "two")
    second = open_checkpoint(tmp_path / "two")
    assert [step.step for step in manifest.steps] == ["quant.int4", "quant.int8"]
    assert manifest.source == first.source
    assert manifest.steps[1].changed == 0
    assert {skip.reason for skip in manifest.steps[1].skipped} == {"is quantised already"}
    assert second.structure == first.structure
    shards = [name for name in contents(tmp_path / "one") if name.startswith("model-")]
    assert all(contents(tmp_path / "one")[name] == contents(tmp_path / "two")[name] for name in shards)


def test_what_steps_skip_is_on_record(whole: Path) -> None:
    (_, rounding) = Manifest.load(whole).steps
    assert [(skip.path, skip.reason) for skip in rounding.skipped] == [
        ("model.layers.0.mlp.down_proj", "matches the pattern *.0.mlp.down_proj of skip")
    ]


# --- hostile surroundings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["model", "model/small", ".", "model/../model", "link", "link/small"])
@pytest.mark.parametrize("force", [False, True])
def test_the_output_may_not_touch_the_source(tmp_path: Path, place: str, force: bool) -> None:
    base = tmp_path / "base"
    compress(open_model(str(tiny_folder(tmp_path / "plain"))), INT4, base / "model")
    (base / "link").symlink_to("model")
    before = contents(base / "model")
    with pytest.raises(UserError, match="the output must"):
        compress(open_checkpoint(base / "model"), INT4, base / place, force=force)
    assert contents(base / "model") == before
    assert sorted(path.name for path in base.iterdir()) == ["link", "model"]


def test_an_output_beside_a_gguf_file_is_fine(tmp_path: Path) -> None:
    compress(open_model(str(tiny_gguf(tmp_path / "model.gguf"))), INT4, tmp_path / "small")


def test_an_output_that_is_there_is_replaced_only_by_force(model: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    compress(open_model(str(model)), INT4, output)
    before = contents(output)
    with pytest.raises(UserError, match="pass --force"):
        compress(open_model(str(model)), ROTATED, output)
    assert contents(output) == before
    compress(open_model(str(model)), ROTATED, output, force=True)
    assert contents(output) == contents(whole)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UserError, match=r"has no edgekit\.json"):
        compress(open_model(str(model)), INT4, foreign, force=True)
    assert (foreign / "cat.jpg").exists()


def test_an_output_that_came_meanwhile_is_left_alone(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"

    def interfere(progress: Progress) -> None:
        if progress.done == 2:
            output.mkdir()
            (output / "note").write_text("mine")

    with pytest.raises(UserError, match="output must not exist"):
        compress(open_model(str(model)), INT4, output, on_progress=interfere)
    assert contents(output) == {"note": b"mine"}
    assert partial(output).exists()


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("block", [1, 3])
def test_a_full_disk_leaves_nothing_at_the_target_and_can_be_resumed(
    problem: Exception, block: int, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, calls, write = tmp_path / "small", [], runner.write_block

    def full(path: Path, data: Any) -> Any:
        calls.append(path)
        if len(calls) == block:
            path.write_bytes(b"half")
            raise problem
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_block", full)
        with pytest.raises(BudgetError, match="the disk is full"):
            compress(open_model(str(model)), ROTATED, output)
    assert not output.exists()
    assert partial(output).exists() == (block > 1)  # with nothing done there is nothing to go on with
    compress(open_model(str(model)), ROTATED, output, resume=block > 1)
    assert contents(output) == contents(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB; the tiny model takes 90 kB at 4 bits and 480 kB as float."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", place]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(model: Path, small_disk: Path) -> None:
    rotated = Recipe("rotated", "", (Rotate(),))
    with pytest.raises(BudgetError, match=r"room for the compressed model: 0\.6 MB are to be written .* are free"):
        compress(open_model(str(model)), rotated, small_disk / "small")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_is_named_as_the_cause(
    model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_refuse_small_disk", lambda *_: None)
    with pytest.raises(BudgetError, match="the disk is full"):
        compress(open_model(str(model)), Recipe("rotated", "", (Rotate(),)), small_disk / "small")
    assert not (small_disk / "small").exists()


def test_a_read_only_disk_is_refused(model: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="must be writable"):
        compress(open_model(str(model)), INT4, small_disk / "small")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(UserError, match="must be writable"):
        compress(open_model(str(model)), INT4, tmp_path / "mine" / "small")


@pytest.mark.parametrize("place", ["file/small", "x" * 250])
def test_a_place_that_cannot_be_written_is_refused(place: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(UserError, match="must be writable"):
        compress(open_model(str(model)), INT4, tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("name", "left"),
    [("model.embed_tokens.weight", False), ("model.layers.1.mlp.up_proj.weight", True)],
)
def test_broken_weights_are_named_and_nothing_is_published(tmp_path: Path, name: str, left: bool) -> None:
    folder, output = tiny_folder(tmp_path / "model"), tmp_path / "small"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[name][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=name.removesuffix(".weight").replace(".", r"\.")):
        compress(open_model(str(folder)), INT4, output)
    assert not output.exists()
    assert partial(output).exists() == left


def test_an_unknown_architecture_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", config={"architectures": ["T5ForConditionalGeneration"]})
    with pytest.raises(ModelError, match="T5ForConditionalGeneration"):
        compress(open_model(str(folder)), INT4, tmp_path / "small")
    assert not partial(tmp_path / "small").exists()


def test_a_pattern_that_matches_nothing_stops_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    recipe = Recipe("slip", "", (Int4(skip=("layer.0.*",)),))
    with pytest.raises(UserError, match=r"'layer\.0\.\*' matches none"):
        compress(open_model(str(model)), recipe, tmp_path / "small")
    with pytest.raises(UserError, match=r"'layer\.0\.\*' matches none"):
        plan(open_model(str(model)), recipe)
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class Needy(Int4):
    needs: ClassVar[Any] = "model"


def test_a_step_that_needs_a_whole_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quant\.int4 works on a whole model"):
        compress(open_model(str(model)), Recipe("needy", "", (Needy(),)), tmp_path / "small")


# --- the dry run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [INT4, load_recipe("int8"), ROTATED], ids=lambda recipe: str(recipe.name))
@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_has_the_sizes_that_come_and_touches_nothing(tmp_path: Path, recipe: Recipe, tied: bool) -> None:
    source = open_model(str(tiny_folder(tmp_path / "model", tied=tied)))
    before = sorted(tmp_path.rglob("*"))
    forecast = plan(source, recipe)
    assert sorted(tmp_path.rglob("*")) == before

    manifest = compress(source, recipe, tmp_path / "small")
    assert forecast.before_bytes == manifest.steps[0].before_bytes
    assert forecast.after_bytes == manifest.steps[-1].after_bytes
    opened = open_checkpoint(tmp_path / "small")
    assert [(block.name, block.after_bytes) for block in forecast.blocks] == [
        (name, opened.read_block(name).size_bytes) for name in opened.blocks
    ]
    assert forecast.recipe == recipe.resolved()
    assert forecast.peak_memory.how == forecast.seconds.how == "predicted"
    assert forecast.peak_memory.value is not None
    assert forecast.peak_memory.value > max(block.peak_bytes for block in forecast.blocks)
    text = forecast.to_text()
    assert recipe.resolved() in text
    assert "(predicted)" in text
    assert f"{forecast.after_bytes / 1e6:.2f}" in text


# --- memory, on models of real size -----------------------------------------------------------------------------------

MEASURED = """
    import resource, sys
    from pathlib import Path
    from edgekit.compress import compress
    from edgekit.model.sources import open_model
    from edgekit.recipe import load_recipe
    manifest = compress(open_model(sys.argv[1]), load_recipe("int4"), Path(sys.argv[2]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, manifest.steps[0].after_bytes)
"""


def peak_memory(model: str, output: Path) -> tuple[int, int]:
    """Peak resident bytes of a process that compresses `model` with int4, and the bytes of its result."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), model, str(output)]
    peak, size = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(peak), int(size)


@pytest.mark.slow
def test_a_model_of_135_million_weights_takes_less_than_twice_its_float_size(tmp_path: Path) -> None:
    peak, size = peak_memory("smollm2-135m", tmp_path / "small")
    assert peak < 2 * 135e6 * 4
    assert 85e6 < size < 95e6


@pytest.mark.slow
def test_a_model_of_1100_million_weights_takes_less_than_8_gigabytes(tmp_path: Path) -> None:
    folder = large_folder(tmp_path / "model")
    peak, size = peak_memory(str(folder), tmp_path / "small")
    assert peak < 8e9
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert peak < files + 2e9  # mapped pages of the source, and a block or two
    assert 0.6e9 < size < 0.7e9
    shutil.rmtree(tmp_path)


def large_folder(path: Path) -> Path:
    """TinyLlama's shapes in bfloat16, one shard a layer, with few distinct values (it is about memory)."""
    layers, hidden, mlp, vocabulary = 22, 2048, 5632, 32000
    tiny_folder(path, layers=1, hidden=64, tied=False)  # for the tokenizer
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64}
    (path / "config.json").write_text(json.dumps({**config, **sizes, **heads}))
    row = np.random.default_rng(0).standard_normal(mlp).astype(ml_dtypes.bfloat16)

    def matrix(rows: int, columns: int) -> Any:
        return np.tile(row[:columns], (rows, 1))

    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (256, hidden),
              "self_attn.v_proj": (256, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden),
              "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}  # fmt: skip
    norm = np.ones(hidden, ml_dtypes.bfloat16)
    weight_map = {}
    for index in range(layers + 1):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
        if index == layers:
            table = matrix(vocabulary, hidden)
            tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": norm}
        shard = f"model-{index + 1:05}-of-{layers + 1:05}.safetensors"
        safetensors.numpy.save_file(tensors, path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path
