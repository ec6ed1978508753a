"""The embedder: order, grouping, pooling, texts that are too long, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from hypothesis import given
from hypothesis import strategies as st
from tiny_encoder import tiny_encoder

from edgekit.bundle import EncoderSpec
from edgekit.errors import ModelError, UserError
from edgekit.export.encoder import export_encoder
from edgekit.export.targets import TARGETS
from edgekit.model.sources import open_model
from edgekit.runtime.embeddings import Embedder, groups, pooled

LONG = "measure the memory " * 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    checkpoint = open_model(str(tiny_encoder(folder / "model")))
    export_encoder(checkpoint, folder / "bundle", target=TARGETS["portable"])
    return folder / "bundle"


@pytest.fixture(scope="module")
def embedder(bundle: Path) -> Embedder:
    return Embedder.open(bundle, threads=1)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_groups_cover_all_with_one_length_each(lengths: list[int], most: int) -> None:
    found = list(groups(lengths, most=most))
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        assert len({lengths[index] for index in group}) == 1
        assert len(group) == 1 or len(group) * lengths[group[0]] <= most


def test_vectors_keep_the_order_and_do_not_depend_on_neighbours(embedder: Embedder) -> None:
    texts = ["the dog", "a small model runs on the device in your hand", "fox", "the dog", "the cat"]
    together = embedder.embed(texts)
    assert together.shape == (5, embedder.dim)
    assert together.dtype == np.float32
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert not np.allclose(together[0], together[4])


def test_no_texts_give_no_vectors(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_a_long_text_is_refused_or_cut_and_named(embedder: Embedder) -> None:
    with pytest.raises(UserError, match=r"at most 24 tokens: number 1 of 2 .* has \d+; split it, or pass truncate"):
        embedder.embed(["short", LONG])
    result = embedder.encode(["short", LONG], truncate=True)
    assert result.truncated == (1,)
    assert result.tokens[1] == embedder.count_tokens([LONG])[0] > embedder.max_length
    ids = embedder.tokenizer.encode(LONG).ids
    cut = embedder._cut(ids)
    assert cut == [*ids[: embedder.max_length - 1], ids[-1]]  # [CLS] ... [SEP]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(pooling: str, normalize: bool) -> None:
    states = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    spec = EncoderSpec("BertModel", "x86", 10, 5, 8, pooling, normalize, 0, 0)  # type: ignore[arg-type]
    expected = states.mean(axis=1) if pooling == "mean" else states[:, 0]
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(pooled(states, spec), expected, rtol=1e-5)


def test_a_vector_of_zeros_stays_zero() -> None:
    spec = EncoderSpec("BertModel", "x86", 10, 5, 8, "mean", True, 0, 0)
    assert not pooled(np.zeros((1, 2, 8), np.float32), spec).any()


def test_one_text_is_no_list(embedder: Embedder) -> None:
    with pytest.raises(UserError, match="takes a list of texts"):
        embedder.embed("one text")
    with pytest.raises(UserError, match="number 1 is int"):
        embedder.embed(["a", 3])  # type: ignore[list-item]


def test_a_changed_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = json.loads((copy / "runtime.json").read_text())
    (copy / "runtime.json").write_text(json.dumps({**data, "dim": 0}))
    with pytest.raises(ModelError, match="differs from its digest"):
        Embedder.open(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("dim", 0), ("max_length", 1 << 30), ("vocabulary", -1), ("resident_bytes", -1)]
)
def test_impossible_specs(key: str, value: int) -> None:
    fields = {"vocabulary": 10, "max_length": 5, "dim": 8, "resident_bytes": 0, key: value}
    with pytest.raises(ModelError, match="must"):
        EncoderSpec("BertModel", "x86", pooling="mean", normalize=True, activation_bytes=0, **fields)


def test_the_command(bundle: Path) -> None:
    shown = json.loads(ok("embed", bundle, "the dog", "the fox", "--json").out)
    assert shown["dim"] == 64
    assert len(shown["embeddings"]) == len(shown["tokens"]) == 2
    lines = ok("embed", bundle, "-", stdin="the dog\nthe fox\n").out.splitlines()
    assert lines[0].split()[0] == "1.0000"
    assert len(lines) == 2
    assert ek("embed", bundle).status == 2
    refused = ek("embed", bundle, LONG)
    assert refused.status == 2
    assert "at most 24 tokens" in refused.err
    assert "[cut: text 0 has" in ok("embed", bundle, LONG, "--truncate").err
    assert "embeddings of 64 numbers" in ok("inspect", bundle).out
    assert json.loads(ok("inspect", bundle, "--json").out)["runtime"]["dim"] == 64
    assert "use edgekit embed" in ek("run", bundle, "hello").err
