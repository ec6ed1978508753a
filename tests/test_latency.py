"""One repetition, and loading: what the engine is asked. No test looks at how fast anything was."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_reference import tiny_checkpoint
from tiny import tiny_tokenizer
from tokenizers import Tokenizer

from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile import latency
from edgekit.profile.latency import at_depth, cold_load, fill, first_token, generate, load, repeat, text_of_length, wake
from edgekit.runtime.engine import Engine
from edgekit.runtime.session import Session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return path


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return Session.open(bundle, context=128, threads=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, list[int]]]]:
    """What the engine is asked, as (tokens in the cache before, tokens appended)."""
    asked: list[tuple[int, list[int]]] = []
    forward = Engine.forward

    def watched(engine: Engine, ids: Sequence[int], *, keep: int = 1) -> NDArray[Any]:
        asked.append((len(engine.tokens), list(ids)))
        assert keep == 1
        return forward(engine, ids, keep=keep)

    monkeypatch.setattr(Engine, "forward", watched)
    monkeypatch.setattr(latency, "WAKE_S", 0)  # one token all the same
    return asked


def test_prompt_generation_and_first_token_each_begin_with_an_empty_cache(
    session: Session, calls: list[tuple[int, list[int]]]
) -> None:
    done = repeat(session, 12, 9, seed=1)
    woken, prompt, *generated, text = calls
    assert woken == (0, [0])
    assert (prompt[0], len(prompt[1])) == (0, 12)
    assert [(before, len(ids)) for before, ids in generated] == [(count, 1) for count in range(9)]
    assert text[0] == 0
    assert 1 <= len(text[1]) <= 12
    assert len(done.gaps) == 9
    assert done.decode[1] - done.decode[0] == pytest.approx(sum(done.gaps))
    assert 0 < done.inside <= sum(done.gaps)
    assert done.first.first_token == done.first.tokenize + done.first.prefill + done.first.sample


def test_each_seed_reads_another_prompt_and_the_same_one_again(
    session: Session, calls: list[tuple[int, list[int]]]
) -> None:
    for seed in (1, 2, 1):
        repeat(session, 12, 1, seed=seed)
    first, second, again = calls[1::4]
    assert first == again
    assert first != second


def test_figures_are_made_of_the_times_that_passed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by a second a look."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(
        Engine, "_run", lambda self, ids, *, keep: self.tokens.extend(ids) or np.zeros((keep, 384), np.float32)
    )
    done = repeat(session, 12, 9, seed=0)
    assert done.prefill[1] - done.prefill[0] == 1
    assert done.gaps == (1.0,) * 9


def test_a_depth_is_reached_once_and_measured_beyond(session: Session, calls: list[tuple[int, list[int]]]) -> None:
    session.engine.rewind(0)
    at_depth(session.engine, 40)
    assert [(before, len(ids)) for before, ids in calls][:3] == [(0, 40), (40, 16), (56, 1)]
    assert len(calls) == 2 + 16
    calls.clear()
    at_depth(session.engine, 40)
    assert calls[0][0] == 40, "what is in the cache is not computed again"
    fill(session.engine, 10)
    assert len(session.engine.tokens) >= 10


def test_the_first_token_reads_the_whole_text_again(session: Session, calls: list[tuple[int, list[int]]]) -> None:
    for _ in range(2):
        first_token(session, "The quick brown fox")
    assert calls[0] == calls[1]
    assert calls[0][0] == 0
    generate(session.engine, 1, 3)
    assert len(calls) == 5


def test_a_cold_load_is_told_only_when_storage_was_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, reason = cold_load(bundle, context=32, threads=1)
    if found is None:
        assert "could not be put out of memory" in reason
    else:
        assert found > 0
    answers = iter(("[0.5, 1000000000]", "[0.5, 5]", "[0.5, null]", "it broke"))
    done = subprocess.CompletedProcess([], 0, "", "a trace\nerror: it broke\n")

    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        done.stdout = next(answers)
        return done

    monkeypatch.setattr(latency.subprocess, "run", run)
    monkeypatch.setattr(latency, "drop_from_memory", lambda path: "")
    assert cold_load(bundle, context=32, threads=1) == (0.5, "")
    for words in ("read from it, not from storage", "read from it, not from storage", "ended: error: it broke"):
        found, reason = cold_load(bundle, context=32, threads=1)
        assert found is None
        assert words in reason
    monkeypatch.setattr(latency, "drop_from_memory", lambda path: "there is no way")
    assert cold_load(bundle, context=32, threads=1) == (None, "there is no way")


def test_a_load_is_timed(bundle: Path) -> None:
    opened, seconds = load(bundle, context=32, threads=1)
    assert opened.engine.context == 32
    assert seconds > 0


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


def test_the_engine_is_woken_for_as_long_as_it_takes_and_no_context_is_too_small(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.engine.rewind(0)
    clock = iter(range(1000))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(latency, "WAKE_S", 1.5 * session.engine.context)
    wake(session.engine)
    assert 0 < len(session.engine.tokens) <= session.engine.context
