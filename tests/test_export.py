"""Export: what is in the bundle, what is recorded of it, and that a bad export leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_decoder import stored
from test_reference import rounded, tiny_checkpoint

from edgekit.bundle import MODEL, WEIGHTS, Bundle, LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.errors import BudgetError, ModelError, UserError
from edgekit.export import decoder, parity
from edgekit.export.export import export
from edgekit.export.parity import Bounds
from edgekit.export.targets import TARGETS, find_target
from edgekit.manifest import FileRecord, Manifest, StepRecord
from edgekit.quant.grid import Grid
from edgekit.report import Measurement, Report
from edgekit.runtime.session import Session

PORTABLE, X86 = TARGETS["portable"], TARGETS["x86"]


def with_asset(checkpoint: Checkpoint, name: str, content: bytes | None) -> Checkpoint:
    assets = {**checkpoint.assets, name: content}
    return replace(checkpoint, assets={key: value for key, value in assets.items() if value is not None})


def value_of(manifest: Manifest, name: str) -> float:
    (row,) = [row for row in manifest.measurements if row.name == name]
    assert row.value is not None
    return row.value


def test_the_bundle_is_whole_and_runs(tmp_path: Path) -> None:
    checkpoint = with_asset(tiny_checkpoint(), "generation_config.json", b'{"eos_token_id": [2, 0]}')
    stages: list[str] = []
    manifest = export(checkpoint, tmp_path / "bundle", target=PORTABLE, on_progress=stages.append)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest == manifest
    found = {path.name for path in bundle.path.iterdir()}
    assert found == {*manifest.files, "edgekit.json"}
    assert {MODEL, WEIGHTS, "runtime.json", "report.json", "tokenizer.json", "chat_template.jinja"} <= found
    assert bundle.file("tokenizer.json").read_bytes() == checkpoint.assets["tokenizer.json"]
    spec = bundle.spec
    assert (spec.architecture, spec.target, spec.vocabulary) == ("LlamaForCausalLM", "portable", 384)
    assert (spec.context_length, spec.eos_ids) == (256, (2, 0))
    assert spec.layers == (LayerCache(2, 16), LayerCache(2, 16))
    assert len(stages) == 3
    assert Session.open(bundle.path).generate("The quick", max_tokens=4).text() != ""


def test_parity_is_recorded_in_manifest_and_report(tmp_path: Path) -> None:
    manifest = export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE)
    assert value_of(manifest, "parity: mean KL to the NumPy forward") < 1e-9
    assert value_of(manifest, "parity: top-1 agreement") == 100
    sentence = manifest.measurements[-1]
    assert (sentence.name, sentence.n) == ("sample: distinct tokens", 16)
    assert sentence.note
    report = Report.load(tmp_path / "bundle" / "report.json")
    assert report.measurements == manifest.measurements
    assert {"edgekit", "onnxruntime", "onnx"} <= report.versions.keys()


def test_the_size_is_that_of_the_files(tmp_path: Path) -> None:
    manifest = export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE)
    size = sum((tmp_path / "bundle" / name).stat().st_size for name in (MODEL, WEIGHTS))
    assert value_of(manifest, "size of graph and weights") == size / 1e6


def test_what_happened_before_is_carried_over(tmp_path: Path) -> None:
    step = StepRecord("quant.int4", {"block": 32}, 15, 1000, 200)
    before = Manifest(
        kind="checkpoint",
        source=tiny_checkpoint().source,
        files={"config.json": FileRecord(1, "0" * 64)},
        recipe="int4",
        recipe_sha256="1" * 64,
        seed=7,
        steps=(step,),
        measurements=(Measurement("earlier", 1.0, "x"),),
    )
    manifest = export(replace(tiny_checkpoint(), manifest=before), tmp_path / "bundle", target=PORTABLE)
    assert (manifest.kind, manifest.steps, manifest.seed) == ("bundle", (step,), 7)
    assert (manifest.recipe, manifest.recipe_sha256) == ("int4", "1" * 64)
    assert manifest.measurements[0].name == "earlier"
    assert "config.json" not in manifest.files


def test_the_same_checkpoint_gives_the_same_weights_graph_and_spec(tmp_path: Path) -> None:
    checkpoint = rounded(tiny_checkpoint(), Grid(4, 32, "zero"))
    one, two = (export(checkpoint, tmp_path / name, target=X86).files for name in ("one", "two"))
    changing = {"report.json"}
    assert {n: r for n, r in one.items() if n not in changing} == {n: r for n, r in two.items() if n not in changing}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("grid", [None, Grid(4, 32, "symmetric"), Grid(8, 32, "zero")], ids=str)
def test_every_target_passes_its_parity_check(tmp_path: Path, name: str, grid: Grid | None) -> None:
    checkpoint = tiny_checkpoint("Qwen2ForCausalLM")
    if grid is not None:
        checkpoint = rounded(checkpoint, grid)
    manifest = export(checkpoint, tmp_path / "bundle", target=find_target(name))
    kl = value_of(manifest, "parity: mean KL to the NumPy forward")
    assert (kl > 1e-8) is (grid is not None and grid.bits in find_target(name).integer_bits)


def test_layers_that_8_bit_activations_harm_fall_back_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = rounded(tiny_checkpoint(), Grid(8, 32, "symmetric"))
    kl = value_of(export(checkpoint, tmp_path / "free", target=PORTABLE), "parity: mean KL to the NumPy forward")
    monkeypatch.setitem(parity.BOUNDS, "int8", Bounds(kl=0.9 * kl, agreement=0.9))
    manifest = export(checkpoint, tmp_path / "bundle", target=PORTABLE)
    assert value_of(manifest, "parity: mean KL to the NumPy forward") <= 0.9 * kl
    (row,) = (row for row in manifest.measurements if row.name == "layers with float32 activations")
    assert row.value is not None
    assert 1 <= row.value <= checkpoint.decoder.layers + 1
    levels: dict[int, list[str]] = {}
    for node in onnx.load(tmp_path / "bundle" / MODEL, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            (level,) = (entry.i for entry in node.attribute if entry.name == "accuracy_level")
            levels.setdefault(level, []).append(node.name)
    for name in levels[0]:
        where = "the head" if name.startswith("lm_head") else f"layer {name.split('.')[2]}"
        assert where in row.note
    monkeypatch.setitem(parity.BOUNDS, "int8", Bounds(kl=-1.0, agreement=0.9))
    with pytest.raises(ModelError, match="must agree with the checkpoint"):
        export(checkpoint, tmp_path / "never", target=PORTABLE)


@pytest.mark.parametrize("context", [1, 2, 15, 16, 17, 255, 256])
def test_any_context_up_to_the_models(tmp_path: Path, context: int) -> None:
    manifest = export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE, context=context)
    assert Bundle.open(tmp_path / "bundle").spec.context_length == context
    assert manifest.measurements[-1].n == min(16, max(0, context - 1))


def test_a_model_of_a_very_long_context_gets_a_usable_one(tmp_path: Path) -> None:
    export(tiny_checkpoint(config={"max_position_embeddings": 131072}), tmp_path / "bundle", target=PORTABLE)
    assert Bundle.open(tmp_path / "bundle").spec.context_length == 32768


def test_predicted_weights_are_those_in_the_file_plus_packing(tmp_path: Path) -> None:
    """Untied and float, nothing is held twice: the prediction is the weights file without rotary tables and padding."""
    export(tiny_checkpoint(tied=False), tmp_path / "bundle", target=PORTABLE)
    weights = {name: size for name, (_, size) in stored(tmp_path / "bundle").items() if "rotary" not in name}
    spec = Bundle.open(tmp_path / "bundle").spec
    assert sum(weights.values()) <= spec.resident_bytes < sum(weights.values()) * 1.02


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("tokenizer.json", None, UserError, "a bundle needs tokenizer.json: tiny has none"),
        ("tokenizer.json", b"{", ModelError, "tokenizer.json of tiny must be a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", ModelError, "tokenizer.json of tiny must be a tokenizer"),
        ("generation_config.json", b"{", ModelError, "generation_config.json must hold a JSON object"),
        ("generation_config.json", b"[]", ModelError, "generation_config.json must hold a JSON object"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', ModelError, "eos_token_id must be one or more token"),
        ("generation_config.json", b'{"eos_token_id": [true]}', ModelError, "eos_token_id must be one or more token"),
    ],
)
def test_broken_assets(tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export(with_asset(tiny_checkpoint(), name, content), tmp_path / "bundle", target=PORTABLE)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_makes_no_tokens(tmp_path: Path) -> None:
    silent = {
        **json.loads(tiny_checkpoint().assets["tokenizer.json"]),
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    silent["added_tokens"] = []
    checkpoint = with_asset(tiny_checkpoint(), "tokenizer.json", json.dumps(silent).encode())
    with pytest.raises(ModelError, match="must make tokens of English text"):
        export(checkpoint, tmp_path / "bundle", target=PORTABLE)


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows(tmp_path: Path) -> None:
    small = tiny_checkpoint(
        config={"vocab_size": 300}, tensors={"model.embed_tokens.weight": np.ones((300, 64), np.float32)}
    )
    with pytest.raises(ModelError, match="below the embedding's 300 rows: the tokenizer has 383"):
        export(small, tmp_path / "bundle", target=PORTABLE)


@pytest.mark.parametrize("context", [0, -1, 257])
def test_contexts_out_of_range(tmp_path: Path, context: int) -> None:
    with pytest.raises(UserError, match=f"from 1 to the model's 256: got {context}"):
        export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE, context=context)


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"one of portable, x86, arm, npu-qnn, npu-openvino: got 'amr'; did you mean 'arm'\?"
    ):
        find_target("amr")


def damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, the builder writes one wrong block of weights."""
    build = decoder.build_decoder

    def damaged(checkpoint: Checkpoint, folder: Path, **options: Any) -> tuple[LayerCache, ...]:
        caches = build(checkpoint, folder, **options)
        offset, _ = stored(folder)["model.layers.0.mlp.up_proj.weight"]
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(offset)
            file.write(np.ones(96, np.float32).tobytes())
        return caches

    monkeypatch.setattr("edgekit.export.export.build_decoder", damaged)


def test_a_graph_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    with pytest.raises(ModelError, match="must agree with the checkpoint"):
        export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_bundle_that_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE)
    damage(monkeypatch)
    with pytest.raises(ModelError, match="must agree with the checkpoint"):
        export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE, force=True)
    assert Bundle.open(tmp_path / "bundle").manifest == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_accepted_drift_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    manifest = export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE, accept_drift=True)
    assert value_of(manifest, "parity: mean KL to the NumPy forward") > 1e-4
    assert Bundle.open(tmp_path / "bundle").manifest == manifest


def test_existing_outputs(tmp_path: Path) -> None:
    export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE)
    with pytest.raises(UserError, match="must not exist"):
        export(tiny_checkpoint(), tmp_path / "bundle", target=X86)
    assert Bundle.open(tmp_path / "bundle").spec.target == "portable"
    export(tiny_checkpoint(), tmp_path / "bundle", target=X86, force=True)
    assert Bundle.open(tmp_path / "bundle").spec.target == "x86"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgekit.export.export.build_decoder", full)
    with pytest.raises(BudgetError, match="the disk is full"):
        export(tiny_checkpoint(), tmp_path / "bundle", target=PORTABLE)
    assert not list(tmp_path.iterdir())
