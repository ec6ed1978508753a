"""Entanglement across cuts: known spectra, the maps, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from tiny import CORPUS, tiny_folder

from edgekit.errors import ModelError, UserError
from edgekit.model.sources import open_model
from edgekit.tn.entanglement import entanglement, heat, survey_entanglement, write_map


def test_known_spectra() -> None:
    flat = entanglement(np.ones(8), module="w", cut="rows")
    assert flat.entropy == pytest.approx(math.log(8))
    assert flat.share == pytest.approx(1)
    assert flat.rank99 == 8
    single = entanglement(np.array([3.0, 0.0, 0.0]), module="w", cut="rows")
    assert (single.entropy, single.effective_rank, single.rank99) == (0.0, 1.0, 1)
    bell = entanglement(np.array([1.0, 1.0, 0.0, 0.0]), module="w", cut="sites")
    assert bell.effective_rank == pytest.approx(2)


@pytest.mark.parametrize("values", [np.zeros(3), np.array([np.nan, 1.0]), np.array([np.inf])])
def test_no_spectrum(values: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"not zero.*up_proj"):
        entanglement(values, module="up_proj", cut="rows")


def test_the_maps(tmp_path: Path) -> None:
    rows = survey_entanglement(open_model(str(tiny_folder(tmp_path / "model"))))
    assert len(rows) == 2 * 7 * 2
    leaves, layers, values = heat(rows, "rows")
    assert (len(leaves), layers, values.shape) == (7, ["0", "1"], (7, 2))
    assert ((values > 0) & (values <= 1 + 1e-9)).all()
    write_map(rows, tmp_path / "map.html", title="<b>&</b>")
    text = (tmp_path / "map.html").read_text()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    with pytest.raises(UserError, match=r"\.png or a \.html"):
        write_map(rows, tmp_path / "map.txt", title="t")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = survey_entanglement(open_model(str(tiny_folder(tmp_path / "model", mlp=97))))
    write_map(rows, tmp_path / "map.png", title="t")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = tiny_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(CORPUS * 200))
    words = ("inspect", model, "--entanglement")
    plain, read = (
        json.loads(ok(*words, "--json", *more).out)["entanglement"] for more in ((), ("--calibration", text))
    )
    assert len(plain) == len(read) == 28
    assert plain[0]["module"] == read[0]["module"] == "model.layers.0.self_attn.q_proj"
    assert plain[0]["effective_rank"] != read[0]["effective_rank"]
    assert plain[1] == read[1]  # between sites there is no metric
    assert "effective rank" in ok(*words, "--map", tmp_path / "m.html").out
    assert (tmp_path / "m.html").is_file()
    text.write_text("too short")
    assert "calibration text must fill" in ek(*words, "--calibration", text).err
    assert "belong to --entanglement" in ek("inspect", model, "--map", tmp_path / "m.html").err
