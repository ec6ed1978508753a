"""Profiling: which rows a report has and what stands behind them. No test looks at how fast anything was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_reference import tiny_checkpoint
from tiny import tiny_tokenizer
from tokenizers import Tokenizer

from edgekit.errors import UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile.compare import compare
from edgekit.profile.latency import profile, text_of_length
from edgekit.report import Measurement, Report
from edgekit.runtime.engine import Engine
from edgekit.runtime.session import Session

SMALL: dict[str, Any] = {"prompt_tokens": 12, "generate_tokens": 9, "repetitions": 4}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return path


@pytest.fixture(scope="module")
def report(bundle: Path) -> Report:
    return profile(bundle, **SMALL, threads=1)


def rows(report: Report) -> dict[str, Measurement]:
    return {row.name: row for row in report.measurements}


def test_the_rows_are_those_that_are_promised(report: Report) -> None:
    found = rows(report)
    assert {name: row.unit for name, row in found.items()} == {
        "pp12": "tok/s",
        "tg9": "tok/s",
        "time to first token": "ms",
        "gap between tokens": "ms",
        "gap between tokens, p90": "ms",
        "gap between tokens, p99": "ms",
        "drift of the gaps": "ratio",
        "load": "ms",
        "size of graph and weights": "MB",
        "memory predicted": "MB",
        "peak PSS": "MB",
        "peak RSS": "MB",
    }
    assert {name for name, row in found.items() if row.how != "measured"} == {"memory predicted"}
    for name, row in found.items():
        assert row.value is None or row.value > 0, name
        assert row.value is not None or row.note, name


def test_each_row_counts_what_is_behind_it(report: Report) -> None:
    found = rows(report)
    repeated = ("pp12", "tg9", "time to first token", "gap between tokens")
    assert {name for name, row in found.items() if row.n == 4} == set(repeated) == set(report.samples)
    assert all(found[name].spread is not None for name in repeated)
    assert found["gap between tokens, p99"].n == found["drift of the gaps"].n == 4 * 9
    for name in repeated:
        assert len(report.samples[name]) == 4
        assert found[name].value == pytest.approx(np.median(report.samples[name]))
    assert found["gap between tokens, p90"].value <= found["gap between tokens, p99"].value  # type: ignore[operator]


def test_the_report_says_of_what_and_where_it_is(report: Report, bundle: Path) -> None:
    digest = Session.open(bundle).bundle.manifest.files["model.onnx"].sha256
    assert report.subject == f"tiny {digest[:12]}"
    assert report.machine["threads"] == "1"
    assert report.machine["arch"]
    assert {"edgekit", "onnxruntime", "numpy"} <= report.versions.keys()
    assert report.created.endswith("Z")
    size = sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert rows(report)["size of graph and weights"].value == size / 1e6
    predicted = rows(report)["memory predicted"]
    assert predicted.value == Session.open(bundle).memory.total_bytes / 1e6
    assert "256 tokens" in predicted.note


def test_reports_can_be_saved_and_compared(report: Report, bundle: Path, tmp_path: Path) -> None:
    report.save(tmp_path / "a.json")
    profile(bundle, **SMALL, threads=1).save(tmp_path / "b.json")
    first, second = Report.load(tmp_path / "a.json"), Report.load(tmp_path / "b.json")
    assert first == report
    verdicts = {verdict.name: verdict for verdict in compare(first, second)}
    assert verdicts.keys() == rows(report).keys()
    assert all(verdicts[name].p_value is not None for name in report.samples)


class Watched:
    """What the engine was asked, as (tokens in the cache before, tokens appended), from the first repetition on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[int], list[int]]] = []
        forward = Engine.forward

        def watched(engine: Engine, ids: Sequence[int], *, keep: int = 1) -> NDArray[Any]:
            self.calls.append((list(engine.tokens), list(ids)))
            assert keep == 1
            return forward(engine, ids, keep=keep)

        monkeypatch.setattr(Engine, "forward", watched)


def test_prompt_and_generation_each_begin_with_an_empty_cache(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    profile(bundle, prompt_tokens=12, generate_tokens=9, repetitions=2)
    each = 1 + 9 + 1
    assert len(watched.calls) == (1 + 2) * each, "one repetition more than counted, as warm-up"
    for begin in range(0, len(watched.calls), each):
        prompt, *generated, text = watched.calls[begin : begin + each]
        assert (prompt[0], len(prompt[1])) == ([], 12)
        assert [(len(before), len(ids)) for before, ids in generated] == [(count, 1) for count in range(9)]
        assert text[0] == []
        assert 1 <= len(text[1]) <= 12


def test_each_repetition_reads_another_prompt_and_each_profile_the_same_ones(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    for _ in range(2):
        profile(bundle, prompt_tokens=12, generate_tokens=1, repetitions=3)
    half = len(watched.calls) // 2
    assert watched.calls[:half] == watched.calls[half:]
    prompts = {tuple(ids) for _, ids in watched.calls[:half:3]}  # prompt, generation, text
    assert len(prompts) == 4


def test_figures_are_made_of_the_times_that_passed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by a second a look."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(
        Engine, "_run", lambda self, ids, *, keep: self.tokens.extend(ids) or np.zeros((keep, 384), np.float32)
    )
    found = rows(profile(bundle, prompt_tokens=12, generate_tokens=9, repetitions=3))
    assert found["pp12"].value == 12
    assert found["tg9"].value == 1
    assert found["gap between tokens"].value == found["gap between tokens, p99"].value == 1000
    assert found["drift of the gaps"].value == 1
    assert found["time to first token"].value >= 2000  # type: ignore[operator]


def test_progress_is_told_from_none_to_all(bundle: Path) -> None:
    told: list[tuple[int, int]] = []
    profile(bundle, prompt_tokens=2, generate_tokens=2, repetitions=3, on_repetition=lambda *state: told.append(state))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_few_tokens_make_no_drift(bundle: Path) -> None:
    found = rows(profile(bundle, prompt_tokens=2, generate_tokens=2, repetitions=1))
    assert (found["drift of the gaps"].value, found["drift of the gaps"].note) == (None, "too few tokens")
    assert found["pp2"].spread is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt must be at least 1: got 0"),
        ({"generate_tokens": -5}, "--generate must be at least 1: got -5"),
        ({"repetitions": 0}, "--repeat must be at least 1: got 0"),
        ({"prompt_tokens": 256}, "below the context of 256 tokens: got 256 and 9; pass smaller ones"),
        ({"generate_tokens": 256}, "below the context of 256 tokens: got 12 and 256"),
        ({"context": 12}, "below the context of 12 tokens: got 12 and 9"),
        ({"context": 0}, "--context must be from 1"),
        ({"threads": 0}, "--threads must be at least 1: got 0"),
    ],
)
def test_options_that_cannot_be(bundle: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        profile(bundle, **{**SMALL, **options})


def test_prompt_and_answer_may_nearly_fill_the_context(bundle: Path) -> None:
    found = rows(profile(bundle, prompt_tokens=31, generate_tokens=31, repetitions=1, context=32))
    assert found["pp31"].n == found["tg31"].n == 1


@pytest.mark.parametrize("count", [1, 2, 7, 64, 300])
def test_a_text_has_as_many_tokens_as_asked_for_or_a_few_less(count: int) -> None:
    tokenizer = tiny_tokenizer(384)
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 384, count).tolist()
        text = text_of_length(tokenizer, ids)
        made = len(tokenizer.encode(text).ids)
        assert text
        assert len(text) == 1 or count - 4 <= made <= count


def test_a_text_can_be_had_of_tokens_without_one() -> None:
    tokenizer: Tokenizer = tiny_tokenizer(384)
    assert tokenizer.decode([383], skip_special_tokens=False) in ("", tokenizer.id_to_token(383))
    assert text_of_length(tokenizer, [10**6])
