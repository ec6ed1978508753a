"""The model card: front matter that the Hub takes, the same bytes for one manifest, digests that stay whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ek, ok
from test_reference import tiny_checkpoint

from edgekit.card import CARD, card_text, write_card
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.manifest import Manifest, SourceRecord
from edgekit.report import Measurement, Report


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return path


@pytest.mark.parametrize(
    ("license", "front"),
    [("apache-2.0", {"license": "apache-2.0"}), ("My Own 1.0", {"license": "other", "license_name": "My Own 1.0"})],
)
def test_front_matter(license: str, front: dict[str, str]) -> None:
    from huggingface_hub import ModelCard

    manifest = Manifest(kind="bundle", source=SourceRecord("a/b@main", "hub", "0" * 64, license), files={})
    data = ModelCard(card_text(manifest)).data.to_dict()
    assert front.items() <= data.items()
    assert data["base_model"] == "a/b"
    assert data["library_name"] == "edgekit"


def test_export_writes_it_and_the_command_renews_it(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / CARD).read_bytes()
    assert CARD in Manifest.load(bundle).files
    ok("card", bundle)
    assert (bundle / CARD).read_bytes() == before
    row = Measurement("accuracy, x|y", 12.5, "%", n=8, spread=3.0)
    Report("eval", (row,)).save(tmp_path / "eval.json")
    ok("card", bundle, "--add", tmp_path / "eval.json")
    ok("card", bundle, "--add", tmp_path / "eval.json")
    text = (bundle / CARD).read_text()
    assert text.count("accuracy, x\\|y") == 1
    assert Manifest.load(bundle).measurements[-1] == row


def test_the_text_has_no_time_in_it(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.created[:10] not in card_text(manifest)


def test_a_broken_bundle_gets_no_card(bundle: Path, tmp_path: Path) -> None:
    assert ek("card", tmp_path).status == 3
    data = json.loads((bundle / "edgekit.json").read_text())
    (tmp_path / "edgekit.json").write_text(json.dumps(data))
    assert ek("card", tmp_path).status == 3
    assert not (tmp_path / CARD).exists()
    assert write_card(bundle).files
