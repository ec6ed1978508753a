"""Rebuilding bundles: the same bytes, other sources and recipes, and the gate of recompress."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ek, ok
from tiny import tiny_gguf

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("again")
    tiny_gguf(home / "tiny.gguf")
    ok("compress", home / "tiny.gguf", "-o", home / "small", "-r", "int4")
    ok("export", home / "small", "-o", home / "bundle", "--target", "portable")
    item = {"context": "The quick brown", "choices": ["fox", "network", "sun"], "answer": 0}
    (home / "questions.jsonl").write_text((json.dumps(item) + "\n") * 4)
    return home


def test_a_bundle_is_built_again_byte_for_byte(made: Path) -> None:
    found = json.loads(ok("reproduce", made / "bundle", "--source", made / "tiny.gguf", "--json").out)
    assert found["identical"]
    assert {"model.onnx", "model.onnx.data", "report.json", "MODEL_CARD.md"} <= set(found["same"])


def test_another_source_or_recipe_is_refused(made: Path, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "other.gguf", seed=5)
    done = ek("reproduce", made / "bundle", "--source", tmp_path / "other.gguf")
    assert (done.status, "must be the one of the manifest" in done.err) == (2, True)
    done = ek("reproduce", made / "bundle", "--source", made / "tiny.gguf", "-r", "int8")
    assert (done.status, "recipe must be the one" in done.err) == (2, True)


def test_a_newer_source_goes_out_only_when_the_policy_holds(made: Path, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "newer.gguf", seed=5)
    policy, store = tmp_path / "policy.toml", tmp_path / "store"
    words = ("recompress", made / "bundle", "--source", tmp_path / "newer.gguf", "--policy", policy)
    words = (*words, "--choices", made / "questions.jsonl", "--store", store)
    rule = '[[rule]]\nmeasure = "accuracy difference, *"\nat_least = '
    policy.write_text(f"{rule}101\n")
    assert ek(*words, "-o", tmp_path / "bad").status == 1
    assert not store.exists()
    policy.write_text(f"{rule}-100\n")
    ok(*words, "-o", tmp_path / "good")
    assert "accuracy difference" in (store / "current" / "MODEL_CARD.md").read_text()
    assert "deployed" in ok("history", "--store", store).out
    assert ek("rollback", "--store", store).status == 2
