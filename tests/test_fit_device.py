"""Predictions for a device: published speeds, refusals with numbers, hostile configurations."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import ek, ok
from test_reference import rounded, tiny_checkpoint

from edgekit.device import load_device
from edgekit.errors import BudgetError, DeviceError, ModelError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.quant.grid import Grid
from edgekit.runtime.fit import GIB, Fit, Footprint, bundle_footprint, config_footprint, fit

PUBLISHED = tomllib.loads((Path(__file__).parent.parent / "benchmarks" / "published.toml").read_text())
SPEEDS: list[dict[str, Any]] = PUBLISHED["speeds"]


def written(folder: Path, model: str, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**PUBLISHED["models"][model], **changes}))
    return path


def llama(tmp_path: Path) -> Footprint:
    return config_footprint(written(tmp_path, "llama-3.1-8b"), bits=4.5)


@pytest.mark.parametrize("row", SPEEDS, ids=lambda row: f"{row['model']}-{row['device']}-{row['body_bits']}")
def test_published_speeds_are_predicted_within_a_quarter(tmp_path: Path, row: dict[str, Any]) -> None:
    path = written(tmp_path, row["model"])
    footprint = config_footprint(path, bits=row["body_bits"], head_bits=row["head_bits"])
    found = fit(footprint, load_device(row["device"]), context=256).tokens_per_s
    assert found is not None
    assert abs(found / row["tokens_per_s"] - 1) <= 0.25


@pytest.mark.parametrize("row", PUBLISHED["counted"], ids=lambda row: f"{row['model']}-{row['device']}-{row['bits']}")
def test_so_are_those_of_models_known_by_their_size(row: dict[str, Any]) -> None:
    size = int(row["parameters"] * row["bits"] / 8)
    footprint = Footprint(row["model"], "any", size, size, 0, 0, 0, 4096, row["parameters"])
    found = fit(footprint, load_device(row["device"]), context=256).tokens_per_s
    assert found is not None
    assert abs(found / row["tokens_per_s"] - 1) <= 0.25


def test_parameters_and_bytes_of_a_known_model(tmp_path: Path) -> None:
    footprint = llama(tmp_path)
    assert abs(footprint.parameters / 8.03e9 - 1) < 0.001
    assert footprint.cache_bytes == 32 * 2 * 8 * 128 * 2
    table = 128256 * 4096 * 4.5 / 8
    assert footprint.weights_bytes - footprint.read_bytes == int(table)
    tied = config_footprint(written(tmp_path, "llama-3.1-8b", tie_word_embeddings=True), bits=4.5)
    assert tied.weights_bytes == tied.read_bytes == footprint.read_bytes


def test_an_8b_model_is_refused_on_a_4_gb_pi_with_the_numbers(tmp_path: Path) -> None:
    found = fit(llama(tmp_path), load_device("pi5"), context=2048, ram_gb=4)
    assert not found.fits
    with pytest.raises(BudgetError, match=r"needs 5,0\d\d MB .*Pi 5.* with 4 GB has 3,837 MB.*up to 6\.\d B.* 8 GB"):
        found.refuse_if_too_large()
    assert fit(llama(tmp_path), load_device("pi5"), context=2048, ram_gb=8).fits


def test_the_largest_context_is_the_largest_that_fits(tmp_path: Path) -> None:
    found = fit(llama(tmp_path), load_device("pi5"), ram_gb=8)
    assert not found.fits
    longest = found.largest_context
    assert 0 < longest < found.context
    assert replace(found, context=longest).fits
    assert not replace(found, context=longest + 64).fits
    with pytest.raises(BudgetError, match=f"--context {longest} fits"):
        found.refuse_if_too_large()


def test_without_a_bandwidth_there_is_no_speed(tmp_path: Path) -> None:
    found = fit(llama(tmp_path), load_device("pi-zero2w"))
    assert found.tokens_per_s is None
    assert found.rows()[-1].value is None
    assert "not known" in found.rows()[-1].note


def test_measured_read_bandwidth_stands_in_for_that_of_decoding(tmp_path: Path) -> None:
    pi5 = replace(load_device("pi5"), bandwidth_decode_gbs=None)
    assert fit(llama(tmp_path), pi5, context=64).bandwidth_gbs == 10.7


def test_every_row_is_labelled_as_predicted(tmp_path: Path) -> None:
    assert {row.how for row in fit(llama(tmp_path), load_device("pi5")).rows()} == {"predicted"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "--context must be from 1 to the model's 131072: got 0"),
        ({"context": 1 << 20}, "--context must be"),
        ({"ram_gb": 0.0}, "--ram must be above zero"),
        ({"ram_gb": float("inf")}, "--ram must be above zero"),
    ],
)
def test_impossible_requests(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(llama(tmp_path), load_device("pi5"), **options)


def test_unknown_memory_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say how many GB it has with --ram"):
        fit(llama(tmp_path), load_device("generic-x86"))
    assert isinstance(fit(llama(tmp_path), load_device("generic-x86"), ram_gb=64), Fit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "hidden_size must be a positive integer: got None"),
        ('{"hidden_size": -1}', "got -1"),
        ('{"hidden_size": true}', "got True"),
        ('{"hidden_size": 99999999999999999999}', "hidden_size must be"),
    ],
)
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        config_footprint(tmp_path / "config.json", bits=4)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be readable"):
        config_footprint(tmp_path / "config.json", bits=4)
    with pytest.raises(UserError, match="--bits must be from 1 to 32: got 0"):
        config_footprint(tmp_path / "config.json", bits=0)


def test_a_bundle_on_its_device_and_on_another(tmp_path: Path) -> None:
    checkpoint = rounded(tiny_checkpoint(), Grid(4, 32, "symmetric"))
    export(checkpoint, tmp_path / "tiny", target=TARGETS["x86"])
    footprint = bundle_footprint(tmp_path / "tiny")
    assert footprint.arch == "x86_64"
    assert 0 < footprint.read_bytes <= footprint.weights_bytes * 1.01
    with pytest.raises(DeviceError, match=r"for x86_64, pi4 is aarch64; export it again with --device pi4"):
        fit(footprint, load_device("pi4"))
    assert fit(footprint, load_device("generic-x86"), ram_gb=GIB).fits


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, "llama-3.1-8b")
    refused = ek("fit", path, "--device", "pi4", "--ram", "4", "--context", "2048")
    assert refused.status == 4
    assert "would fit" in refused.err
    done = ok("fit", path, "--device", "pi4", "--context", "2048", "--json")
    assert [row["how"] for row in json.loads(done.out)["measurements"]] == ["predicted"] * 3
