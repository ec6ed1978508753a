"""A/B through the command line and its parts: equal models, a spoiled one, the cache, a policy as a gate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from test_evaluate import TEXT, log_p, random_table, scorer_of, uniform_table
from test_reference import rounded, tiny_checkpoint

from edgekit.errors import UserError
from edgekit.evaluate.against import compare_task, verdict_of
from edgekit.evaluate.cache import cached
from edgekit.evaluate.choices import Answer, Item
from edgekit.evaluate.divergence import divergence
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.quant.grid import Grid


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ab")
    export(tiny_checkpoint(), folder / "a", target=TARGETS["portable"])
    export(rounded(tiny_checkpoint(), Grid(4, 32, "symmetric")), folder / "b", target=TARGETS["portable"])
    (folder / "book.txt").write_text(TEXT)
    rows = [
        {"context": f"The {word} brown", "choices": ["fox", "dog", "sun"], "answer": 0} for word in TEXT.split()[:12]
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_divergence_is_that_of_a_slow_sum() -> None:
    a, b = scorer_of(random_table()), scorer_of(uniform_table())
    found = divergence(a, b, TEXT, window=16, max_windows=2)
    ids = a.tokenizer.encode(TEXT).ids
    kl = []
    for begin in (0, 16):
        for at in range(begin + 9, begin + 16):
            logits = a.model.logits[ids[at - 1]]
            p = [log_p(logits, token) for token in range(len(logits))]
            kl.append(math.fsum(math.exp(each) * (each + math.log(len(p))) for each in p))
    assert found.kl.mean == pytest.approx(np.mean(kl), rel=1e-5)
    assert found.b == pytest.approx(384)
    assert found.tokens == 14
    same = divergence(a, scorer_of(random_table()), TEXT, window=16)
    assert (same.kl.mean, same.agreement.mean, same.loss.mean) == (0, 100, 0)


def test_models_of_different_vocabulary_are_refused() -> None:
    other = scorer_of(uniform_table())
    other.model.logits = other.model.logits[:, :300]
    with pytest.raises(UserError, match="one vocabulary"):
        divergence(scorer_of(random_table()), other, TEXT, window=16)


def test_the_most_spoiled_answers_come_first() -> None:
    items = [Item(f"q{at}", ("x", "y"), 0) for at in range(4)]
    a = [Answer(0, 0, 0, (0.0, -9.0))] * 4
    b = [a[0], Answer(1, 1, 0, (-3.0, -1.0)), Answer(1, 0, 0, (-9.0, -1.0)), a[0]]
    found = compare_task("t", items, a, b, examples=1)
    assert [(example.context, example.right, example.chosen, example.margin) for example in found.worst] == [
        ("q2", "x", "y", 8.0)
    ]
    assert (found.plain.lost, found.by_bytes.lost) == (2, 1)
    assert verdict_of([found], within=1).startswith("cannot tell within 1 points")


def test_the_command_compares_caches_and_gates(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    words = ("eval", home / "a", home / "b", "--text", home / "book.txt", "--choices", home / "questions.jsonl")
    words = (*words, "--window", "16")
    first = json.loads(ok(*words, "--json").out)
    names = {row["name"] for row in first["measurements"]}
    assert {"KL divergence, book.txt", "accuracy flips, questions.jsonl"} <= names
    monkeypatch.setattr("edgekit.cli.eval._Run.scorer", None)  # nothing is opened the second time
    again = json.loads(ok(*words, "--json").out)
    assert again["measurements"] == first["measurements"]
    assert "verdict: " in ok(*words).out

    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nmeasure = "KL divergence, *"\nat_most = 1000\n')
    assert "all 1 rules hold" in ok(*words, "--policy", policy).out
    policy.write_text('[[rule]]\nmeasure = "KL divergence, *"\nat_most = -1\n')
    done = ek(*words, "--policy", policy)
    assert done.status == 1
    assert "broken: KL divergence, book.txt" in done.err


def test_needles_through_the_command(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    row = {"needle": "The code is 7.", "question": "What is the code?", "answer": "7"}
    (tmp_path / "needles.jsonl").write_text((json.dumps(row) + "\n") * 3)
    words = ("--needles", tmp_path / "needles.jsonl", "--book", home / "book.txt", "--length", "120", "--json")
    for targets in ((home / "a",), (home / "a", home / "b")):
        rows = {row["name"]: row for row in json.loads(ok("eval", *targets, *words).out)["measurements"]}
        kind = "accuracy" if len(targets) == 1 else "smooth accuracy difference"
        assert rows[f"{kind}, needles in 120 tokens"]["n"] == 3
    assert "pass both" in ek("eval", home / "a", "--needles", tmp_path / "needles.jsonl").err


def test_a_damaged_cache_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    key: dict[str, object] = {"kind": "test"}
    assert cached(key, lambda: [1]) == [1]
    assert cached(key, lambda: [2]) == [1]
    assert cached(key, lambda: [2], fresh=True) == [2]
    (path,) = (tmp_path / "eval").iterdir()
    path.write_text("{")
    assert cached(key, lambda: [3]) == [3]


def test_a_cache_that_cannot_be_written_is_said_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    words = ("--text", home / "book.txt", "--window", "16", "--windows", "2", "--choices", home / "questions.jsonl")
    done = ok("eval", home / "a", *words)
    assert done.err.count("results are not kept") == 1
    assert "perplexity" in done.out
