"""The router: the logistic model against known answers, thresholds, files, labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.assistant.label import Question, is_right, load_questions
from edgekit.assistant.logistic import Logistic, calibration_error, curve, fit, sigmoid
from edgekit.assistant.router import (
    AFTER,
    SHARES,
    Labelled,
    Neighbours,
    encoded,
    evaluate,
    fit_router,
    load,
    load_labelled,
    save,
)
from edgekit.errors import ModelError, UserError


def cloud(n: int, *, seed: int = 0, weights: tuple[float, ...] = (2.0, -1.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels that a logistic model with these weights, intercept -1, makes; the columns are not standard."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((n, len(weights)))
    labels = (random.random(n) < sigmoid(rows @ np.array(weights) - 1)).astype(float)
    return rows * 3 + 5, labels


def test_the_weights_are_those_that_made_the_data() -> None:
    rows, labels = cloud(20_000)
    model, unseen = fit(("a", "b", "c"), rows, labels)
    assert np.array(model.weights) == pytest.approx([2.0, -1.0, 0.0], abs=0.08)
    assert model.scale == pytest.approx(1, abs=0.05)
    assert calibration_error(unseen, labels) < 0.02
    fresh, wrong = cloud(5_000, seed=1)
    assert calibration_error(model.probability(fresh), wrong) < 0.03


def test_the_gradient_is_zero_at_the_solution() -> None:
    rows, labels = cloud(300)
    model, _ = fit(("a", "b", "c"), rows, labels, penalty=2.0)
    standard = (rows - np.array(model.mean)) / np.array(model.spread)
    residue = sigmoid(standard @ np.array(model.weights) + model.intercept) - labels
    assert standard.T @ residue + 2.0 * np.array(model.weights) == pytest.approx(0, abs=1e-6)
    assert residue.sum() == pytest.approx(0, abs=1e-6)


def test_rows_that_can_be_separated_and_a_constant_feature_do_no_harm() -> None:
    rows = np.column_stack([np.r_[np.zeros(20), np.ones(20)], np.ones(40)])
    model, unseen = fit(("a", "b"), rows, np.r_[np.zeros(20), np.ones(20)])
    assert np.isfinite([*model.weights, model.intercept, model.scale, model.shift]).all()
    assert unseen[:20].max() < unseen[20:].min()


@pytest.mark.parametrize(("wrong", "rows"), [(9, 1.0), (31, 1.0), (20, np.nan)])
def test_what_cannot_be_fitted(wrong: int, rows: float) -> None:
    with pytest.raises(UserError, match=r"at least 10 right and 10 wrong|must be finite"):
        fit(("a",), np.full((40, 1), rows), (np.arange(40) < wrong).astype(float))


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 9))
def test_curves_rise_and_end_at_all(labels: list[bool], seed: int) -> None:
    wrong = np.array(labels, float)
    found = curve(np.random.default_rng(seed).random(len(wrong)), wrong, SHARES)
    assert list(found.caught) == sorted(found.caught)
    assert found.caught[0] == 0
    assert found.caught[-1] == (1 if wrong.any() else 0)
    perfect = curve(wrong, wrong, SHARES)
    assert all(a >= b - 1e-12 for a, b in zip(perfect.caught, found.caught, strict=True))


def examples(n: int, seed: int = 0) -> list[Labelled]:
    random = np.random.default_rng(seed)
    made = []
    for at in range(n):
        values = random.standard_normal(len(AFTER))
        wrong = bool(random.random() < sigmoid(np.array([2 * values[1] + 2 * values[8] - 1]))[0])
        vector = random.standard_normal(16).astype(np.float32)
        made.append(Labelled(f"question {at}", wrong, tuple(values.tolist()), encoded(vector)))
    return made


def test_a_router_catches_and_keeps_its_share(tmp_path: Path) -> None:
    model = fit_router(examples(800))
    save(model, tmp_path / "router.json")
    loaded = load(tmp_path / "router.json")
    held = examples(800, seed=1)
    found, same = evaluate(model, held), evaluate(loaded, held)
    assert found.after == pytest.approx(same.after)
    at = SHARES.index(0.3)
    assert found.curve.caught[at] > 0.55
    for share in (0.1, 0.3, 0.6):
        first, second = loaded.threshold(share)
        gone = (found.before >= first) | (found.after >= second)
        assert gone.mean() == pytest.approx(share, abs=0.07)
        assert (found.before >= first).mean() < share / 2
    nothing, everything = loaded.threshold(0.0), loaded.threshold(1.0)
    assert min(nothing) > 1
    assert ((found.before >= everything[0]) | (found.after >= everything[1])).mean() > 0.98


def test_neighbours_leave_the_question_itself_out() -> None:
    codes = np.array([[100, 0], [99, 5], [0, 100]] * 10, np.int8)
    wrong = np.array([1.0, 0.0, 0.0] * 10)
    near = Neighbours(codes, wrong)
    vector = np.array([1, 0], np.float32)
    assert near.share(vector) > near.share(vector, but=0) > near.share(np.array([0, 1], np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"edgekit_router": 2},
        {"thresholds": []},
        {"neighbours": {"dim": 7, "codes": "AAAA", "wrong": [1]}},
        {"before": {"features": []}},
        {"after": None},
        {"answers": "x"},
    ],
)
def test_router_files_that_are_wrong(change: dict[str, object], tmp_path: Path) -> None:
    save(fit_router(examples(100)), tmp_path / "router.json")
    data = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(ModelError):
        load(tmp_path / "bad.json")


def test_a_model_that_is_not_finite() -> None:
    with pytest.raises(UserError, match="finite"):
        Logistic(("a",), (0.0,), (1.0,), (float("nan"),), 0.0)
    with pytest.raises(UserError, match="for each of its 2"):
        Logistic(("a", "b"), (0.0,), (1.0,), (1.0,), 0.0)


def test_labelled_answers_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    good = examples(40)
    path.write_text("\n".join(json.dumps(dataclasses.asdict(e)) for e in good) + "\n\n")
    assert load_labelled(path) == good
    for line, message in (("{", "line 1: Exp"), ("{}", "'question' is missing"), ("[]", "must be a table")):
        path.write_text(line)
        with pytest.raises(UserError, match=message):
            load_labelled(path)
    with pytest.raises(UserError, match="got none"):
        fit_router([])
    with pytest.raises(UserError, match="11 features: number 0 has 1"):
        fit_router([dataclasses.replace(good[0], features=(1.0,)), *good])
    with pytest.raises(UserError, match="base64"):
        fit_router([dataclasses.replace(good[0], vector="?"), *good])
    with pytest.raises(UserError, match="different lengths"):
        fit_router([dataclasses.replace(good[0], vector="AAAA"), *good])


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("It began in October 1973. [1]", ["October 1973"], True),
        ("The Silk-Road, of course", ["the silk road"], True),
        ("It is 19731 [1973]", ["1973"], False),
        ("anything", ["the", "!"], False),
        ("", ["x"], False),
    ],
)
def test_right_answers(text: str, answers: list[str], right: bool) -> None:
    assert is_right(text, answers) == right


def test_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": 3, "question": "a?", "answers": ["b"]}\n')
    assert load_questions(path) == [Question("a?", ("b",))]
    path.write_text('{"question": "a?"}')
    with pytest.raises(UserError, match="line 1: the key 'answers' is missing"):
        load_questions(path)
