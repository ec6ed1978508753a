"""Bundles: what opens, and the hostile ones: a file changed, missing or outside, absurd sizes, foreign graphs.

A bundle's digests are its own, so whoever makes a bundle can make them fit; `seal` does that here. Damage is found by
digests, and malice by the checks behind them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_reference import rounded, tiny_checkpoint

from edgekit.bundle import MODEL, SPEC, WEIGHTS, Bundle, DecoderSpec, LayerCache
from edgekit.errors import DeviceError, EdgekitError, ModelError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.manifest import NAME, Manifest, record_files
from edgekit.quant.grid import Grid
from edgekit.runtime.session import Session
from edgekit.schema import parse


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle, not to be changed."""
    path = tmp_path_factory.mktemp("bundle") / "whole"
    export(rounded(tiny_checkpoint(), Grid(4, 32, "symmetric")), path, target=TARGETS["portable"])
    return path


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def seal(folder: Path) -> None:
    """Make the digests fit what is there now."""
    manifest = Manifest.load(folder, verify=False)
    names = [path.name for path in folder.iterdir() if path.name != NAME]
    replace(manifest, files=record_files(folder, names)).save(folder)


def edit_spec(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / SPEC).read_text())
    change(data)
    (folder / SPEC).write_text(json.dumps(data))
    seal(folder)


def test_it_opens_and_answers(whole: Path) -> None:
    bundle = Bundle.open(whole)
    assert bundle.file(MODEL) == whole / MODEL
    assert bundle.has("tokenizer.json")
    assert not bundle.has("vocab.json")
    assert Session.open(whole).generate("The", max_tokens=3).text()


def test_a_spec_survives_its_json() -> None:
    spec = DecoderSpec("a", "x86", 10, 20, (LayerCache(1, 16), LayerCache(2, 32)), (1, 2), 3, 4, "edgekit")
    data = json.loads(spec.to_json())
    assert data["layers"][1] == {"kv_heads": 2, "head_dim": 32, "sparse": False}
    facts = dataclasses.asdict(spec)
    assert facts.pop("static") is facts.pop("decode_threads") is None  # left out where there are none
    assert facts.pop("cache") == "float"
    assert facts.pop("activations") == 15  # and where it is the usual
    coarse = dataclasses.replace(spec, activations=8)
    assert parse(DecoderSpec, json.loads(coarse.to_json()), where="runtime.json", error=ModelError) == coarse
    assert data == json.loads(json.dumps(facts))


def test_cache_bytes_counts_keys_and_values_in_float32() -> None:
    spec = DecoderSpec("a", "x86", 10, 20, (LayerCache(1, 16), LayerCache(2, 32)), (), 0, 0)
    assert spec.cache_bytes(10) == 10 * 2 * 4 * (16 + 64)


# --- what is no bundle ------------------------------------------------------------------------------------------------


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    for name in ("absent", "file.gguf"):
        with pytest.raises(UserError, match=r"must be a folder.*edgekit export"):
            Bundle.open(tmp_path / name)
    with pytest.raises(ModelError, match=r"must hold edgekit\.json"):
        Bundle.open(tmp_path / "empty")


def test_a_checkpoint_is_told_how_to_become_one(bundle: Path) -> None:
    replace(Manifest.load(bundle), kind="checkpoint").save(bundle)
    with pytest.raises(UserError, match=r"is a checkpoint.*make a bundle with edgekit export"):
        Bundle.open(bundle)


# --- damage: the digests find it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, SPEC, "tokenizer.json", "chat_template.jinja", "report.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damaged_files_are_named(bundle: Path, name: str, damage: str) -> None:
    path = bundle / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "changed" else content[:-1])
    with pytest.raises(ModelError, match=f"{name}.*(differs from its digest)|lacks {name}"):
        Session.open(bundle)


def test_a_newer_schema(bundle: Path) -> None:
    data = json.loads((bundle / NAME).read_text())
    (bundle / NAME).write_text(json.dumps({**data, "schema": 2, "signature": "?"}))
    with pytest.raises(ModelError, match=r"has schema 2.*update edgekit"):
        Session.open(bundle)


# --- malice: the digests fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "..\\outside"])
def test_manifests_whose_paths_escape(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_text("secret")
    data = json.loads((bundle / NAME).read_text())
    data["files"][name] = {
        "size_bytes": 6,
        "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b",
    }
    (bundle / NAME).write_text(json.dumps(data))
    with pytest.raises(ModelError, match="must stay inside its folder"):
        Session.open(bundle)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, SPEC, "tokenizer.json"])
def test_files_that_are_links_to_the_outside(bundle: Path, name: str) -> None:
    shutil.move(bundle / name, bundle.parent / "outside")
    (bundle / name).symlink_to(bundle.parent / "outside")
    with pytest.raises(ModelError, match="is a link that leads outside"):
        Session.open(bundle)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, SPEC, "tokenizer.json"])
def test_files_that_the_manifest_does_not_list_are_not_read(bundle: Path, name: str) -> None:
    manifest = Manifest.load(bundle)
    replace(manifest, files={n: r for n, r in manifest.files.items() if n != name}).save(bundle)
    with pytest.raises(ModelError, match=f"must hold {name}"):
        Session.open(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(vocabulary=1 << 40), "vocabulary must be from 1 to 16777216: got 1099511627776"),
        (lambda spec: spec.update(vocabulary=0), "vocabulary must be from 1"),
        (lambda spec: spec.update(context_length=1 << 60), "context_length must be from 1"),
        (lambda spec: spec.update(context_length=-1), "context_length must be from 1"),
        (lambda spec: spec.update(layers=[]), "layers must be from 1"),
        (lambda spec: spec["layers"][1].update(head_dim=1 << 50), r"layers\[1\]\.head_dim must be from 1"),
        (lambda spec: spec["layers"][0].update(kv_heads=0), r"layers\[0\]\.kv_heads must be from 1"),
        (lambda spec: spec.update(operators="mine"), "operators must be one of stock, edgekit"),
        (lambda spec: spec.update(resident_bytes=-(1 << 60)), "bytes must not be below 0"),
        (lambda spec: spec.update(eos_ids="all"), "eos_ids must be a list"),
        (lambda spec: spec.update(context_length="256"), "context_length must be an integer"),
        (lambda spec: spec.update(contxt=1), "unknown key 'contxt'"),
        (lambda spec: spec.pop("layers"), "the key 'layers' is missing"),
    ],
)
def test_specs_that_cannot_be(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_spec(bundle, change)
    with pytest.raises(ModelError, match=message):
        Session.open(bundle)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{" * 50_000])
def test_specs_that_are_no_table(bundle: Path, content: bytes) -> None:
    (bundle / SPEC).write_bytes(content)
    seal(bundle)
    with pytest.raises(ModelError, match=r"runtime\.json must be"):
        Session.open(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(layers=spec["layers"] * 2),
        lambda spec: spec.update(layers=[{"kv_heads": 1, "head_dim": 16}] * 2),
        lambda spec: spec.update(layers=[{"kv_heads": 2, "head_dim": 32}] * 2),
        lambda spec: spec.update(vocabulary=383),
        lambda spec: spec.update(vocabulary=1000),
    ],
)
def test_specs_of_another_graph_are_refused_by_onnxruntime(
    bundle: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """Buffers of a wrong size are an error before anything is written into them."""
    edit_spec(bundle, change)
    with pytest.raises(DeviceError, match="onnxruntime"):
        Session.open(bundle).generate("The", max_tokens=2).text()


def test_a_context_beyond_the_rotary_tables_is_an_error_there(bundle: Path) -> None:
    edit_spec(bundle, lambda spec: spec.update(context_length=4096))
    with pytest.raises(DeviceError, match="onnxruntime"):
        Session.open(bundle).generate("The quick brown fox " * 100, max_tokens=2).text()


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/hostname", "sub/../../outside", "link", "sublink/outside", "file:///etc/hostname"]
)
def test_graphs_whose_weights_lie_outside(bundle: Path, location: str) -> None:
    """onnxruntime itself refuses them, since 1.24, which pyproject.toml asks for."""
    shutil.copy(bundle / WEIGHTS, bundle.parent / "outside")
    (bundle / "link").symlink_to("../outside")
    (bundle / "sublink").symlink_to("..")
    model = onnx.load(bundle / MODEL, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bundle / MODEL).write_bytes(model.SerializeToString())
    manifest = Manifest.load(bundle, verify=False)
    replace(manifest, files=record_files(bundle, manifest.files)).save(bundle)
    with pytest.raises(EdgekitError, match=r"cannot run|escapes|outside|Absolute"):
        Session.open(bundle)


def test_graphs_whose_weights_end_early(bundle: Path) -> None:
    content = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(content[: len(content) // 2])
    seal(bundle)
    with pytest.raises(DeviceError, match="cannot run"):
        Session.open(bundle)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": "1.0"}', b"\xff"])
def test_tokenizers_that_are_none(bundle: Path, content: bytes) -> None:
    (bundle / "tokenizer.json").write_bytes(content)
    seal(bundle)
    with pytest.raises(ModelError, match=r"tokenizer\.json must be a tokenizer"):
        Session.open(bundle)
