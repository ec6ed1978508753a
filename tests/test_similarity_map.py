"""Maps of how alike layers are: the command, the files it writes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from tiny import CORPUS, tiny_folder

from edgekit.errors import UserError
from edgekit.merge.similarity import MEASURES
from edgekit.merge.similarity_map import write_similarity_map

TABLES = {measure: np.array([[1.0, 0.4], [0.4, 1.0]]) for measure in MEASURES}


def test_the_maps(tmp_path: Path) -> None:
    write_similarity_map(TABLES, tmp_path / "map.html", title="a <b>")
    page = (tmp_path / "map.html").read_text()
    assert "a &lt;b&gt;" in page
    assert page.count("<td") == 4 * len(MEASURES)
    with pytest.raises(UserError, match=r"\.png or a \.html"):
        write_similarity_map(TABLES, tmp_path / "map.gif", title="t")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is no part of the base install")
    write_similarity_map(TABLES, tmp_path / "map.png", title="t")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is no part of the base install")
    folder = tiny_folder(tmp_path / "model", layers=4)
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 400))
    words = ("inspect", folder, "--similarity", "--calibration", tmp_path / "text.txt")
    tables = json.loads(ok(*words, "--json", "--map", tmp_path / "map.html").out)["similarity"]
    assert set(tables) == set(MEASURES)
    assert all(np.allclose(table, np.transpose(table)) and len(table) == 4 for table in tables.values())
    assert len(ok(*words).out.splitlines()) == 4
    assert "name one with --calibration" in ek("inspect", folder, "--similarity").err
