"""Deciding whether to answer here or to hand over to a larger model.

The router predicts how probable it is that the local answer is wrong, by two logistic models (logistic.py) that were
fitted on labelled answers of the very model and index (`edgekit router label`, then `fit`): one of what is known
before the answer, one that also knows the draft. For a share s of answers that the user lets go, the quarter of s that
looks worst goes before a draft is made, and the rest after it: the thresholds for this come from the labelled answers.

Features, before: the number of words of the question, the relevance of what was found, the best cosine and coverage,
the gap between the first and the second passage, the best sentence's score and its gap to the next, and how many of
the ten nearest labelled questions had wrong answers. After: also the draft's mean log-probability a token, its mean
entropy, and its length.

What never leaves, and how a question travels, is in privacy.py and handover.py.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.assistant.evidence import Quote
from edgekit.assistant.logistic import Array, Curve, Logistic, curve, fit
from edgekit.assistant.search import Found, terms
from edgekit.assistant.vectors import stored
from edgekit.errors import ModelError, UserError
from edgekit.runtime.embeddings import Floats
from edgekit.schema import parse

VERSION = 1
NEAREST = 10
BEFORE_SHARE = 0.25  # of what is handed over
SHARES = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class Decision:
    """Where an answer comes from, and why. `wrong` is the predicted probability that the local answer is wrong, None
    where no prediction was made; `stage` is whether it was decided before or after a local draft; `reason` is a
    sentence for the user."""

    to: Literal["here", "elsewhere"]
    stage: Literal["before", "after"]
    reason: str
    wrong: float | None = None
    endpoint: str | None = None


@dataclass(frozen=True)
class Draft:
    """What a local draft says of itself: over its tokens the mean log-probability and the mean entropy, in nats."""

    logprob: float
    entropy: float
    tokens: int


BEFORE = ("words", "relevance", "cosine", "coverage", "gap", "sentence", "sentence_gap", "neighbours")
AFTER = (*BEFORE, "logprob", "entropy", "tokens")


@dataclass(frozen=True)
class Labelled:
    """An answer with its label: `before` and `after` have the features' values in order, but for `neighbours`, which
    is 0 here and comes with the other examples; `vector` is the question's, as int8 codes in base64."""

    question: str
    wrong: bool
    features: tuple[float, ...]
    vector: str


@dataclass(frozen=True)
class Neighbours:
    """The labelled questions: `codes` (n, dim) int8, and whether each answer was wrong, (n,)."""

    codes: NDArray[np.int8]
    wrong: Array

    def share(self, vector: Floats, *, but: int | None = None) -> float:
        """The share of wrong answers among the nearest questions, drawn towards that of all; `but` is left out."""
        near = (
            self.codes.astype(np.float32)
            @ vector
            / np.maximum(np.linalg.norm(self.codes.astype(np.float32), axis=1), 1)
        )
        if but is not None:
            near[but] = -2
        best = np.argsort(-near, kind="stable")[:NEAREST]
        return float((self.wrong[best].sum() + 2 * self.wrong.mean()) / (len(best) + 2))


@dataclass(frozen=True)
class Model:
    """A fitted router: the two models, the labelled questions, and for each of SHARES the two thresholds."""

    before: Logistic
    after: Logistic
    neighbours: Neighbours
    thresholds: tuple[tuple[float, float], ...]
    answers: int

    def threshold(self, share: float) -> tuple[float, float]:
        """The probabilities above which an answer is handed over, before and after the draft."""
        pairs = np.array(self.thresholds)
        first, second = (float(np.interp(share, SHARES, pairs[:, at])) for at in (0, 1))
        return first, second


def features(question: str, found: Found, quotes: Sequence[Quote], draft: Draft | None) -> tuple[float, ...]:
    """The features' values: of BEFORE without a draft, of AFTER with one; `neighbours` is 0."""
    scores = [passage.score for passage in found.passages] + [0.0, 0.0]
    sentences = [quote.score for quote in quotes] + [0.0, 0.0]
    values = (
        float(len(terms(question))),
        found.relevance,
        max((p.cosine for p in found.passages), default=0.0),
        max((p.coverage for p in found.passages), default=0.0),
        scores[0] - scores[1],
        sentences[0],
        sentences[0] - sentences[1],
        0.0,
    )
    return values if draft is None else (*values, draft.logprob, draft.entropy, float(draft.tokens))


def encoded(vector: Floats) -> str:
    """A question's vector as a labelled example has it."""
    return base64.b64encode(stored(vector, "int8")).decode()


def fit_router(examples: Sequence[Labelled]) -> Model:
    """A router of labelled answers. Raises UserError where they are too few or do not fit together."""
    rows, labels, neighbours = _rows(examples)
    for at, example in enumerate(examples):
        rows[at, BEFORE.index("neighbours")] = neighbours.share(_vector(example.vector), but=at)
    before, early = fit(BEFORE, rows[:, : len(BEFORE)], labels)
    after, late = fit(AFTER, rows, labels)
    thresholds = tuple(_thresholds(early, late, share) for share in SHARES)
    return Model(before, after, neighbours, thresholds, len(examples))


@dataclass(frozen=True)
class Evaluation:
    """A router on labelled answers: both predictions (n,), the labels (n,), and the curve of the second one."""

    before: Array
    after: Array
    wrong: Array
    curve: Curve


def evaluate(model: Model, examples: Sequence[Labelled], *, shares: tuple[float, ...] = SHARES) -> Evaluation:
    """What a router predicts for labelled answers that it was not fitted on."""
    rows, labels, _ = _rows(examples)
    for at, example in enumerate(examples):
        rows[at, BEFORE.index("neighbours")] = model.neighbours.share(_vector(example.vector))
    before, after = model.before.probability(rows[:, : len(BEFORE)]), model.after.probability(rows)
    return Evaluation(before, after, labels, curve(after, labels, shares))


def predicted(model: Model, values: Sequence[float], vector: Floats) -> float:
    """The probability that an answer with these features is wrong."""
    row = np.array([values])
    row[0, BEFORE.index("neighbours")] = model.neighbours.share(vector)
    chosen = model.before if len(values) == len(BEFORE) else model.after
    return float(chosen.probability(row)[0])


def save(model: Model, path: Path) -> None:
    """Write a router as JSON."""
    data = {
        "edgekit_router": VERSION,
        "before": dataclasses.asdict(model.before),
        "after": dataclasses.asdict(model.after),
        "thresholds": model.thresholds,
        "answers": model.answers,
        "neighbours": {
            "dim": model.neighbours.codes.shape[1],
            "codes": base64.b64encode(model.neighbours.codes.tobytes()).decode(),
            "wrong": [int(label) for label in model.neighbours.wrong],
        },
    }
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        work.write_text(json.dumps(data), encoding="utf-8")
        work.replace(path)
    except OSError as problem:
        raise UserError(f"a router must be a file that can be written: {path}: {problem.strerror}") from problem
    finally:
        work.unlink(missing_ok=True)


def load(path: Path) -> Model:
    """A router from its file. Raises UserError when it cannot be read, ModelError when it is none."""
    data = _json(path)
    if not isinstance(data, dict) or data.get("edgekit_router") != VERSION:
        raise ModelError(f"a router must be a file of edgekit router fit, version {VERSION}: {path} is none")
    try:
        near = data["neighbours"]
        wrong = np.array(near["wrong"], np.float64)
        codes = np.frombuffer(base64.b64decode(near["codes"]), np.int8).reshape(len(wrong), near["dim"])
        pairs = tuple((float(first), float(second)) for first, second in data["thresholds"])
        answers = int(data["answers"])
    except (KeyError, TypeError, ValueError) as problem:
        raise ModelError(f"a router must be whole: {path}: {problem}; fit it again") from problem
    before, after = (
        parse(Logistic, data.get(name), where=f"{path}: {name}", error=ModelError) for name in ("before", "after")
    )
    if before.features != BEFORE or after.features != AFTER or len(pairs) != len(SHARES) or not len(wrong):
        raise ModelError(f"a router must have this version's features: {path} has others; fit it again")
    return Model(before, after, Neighbours(codes, wrong), pairs, answers)


def load_labelled(path: Path) -> list[Labelled]:
    """Labelled answers, one JSON object a line. Raises UserError for a file or a line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"labelled answers must be a file that can be read: {path}: {problem}") from problem
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise UserError(f"a labelled answer must be JSON: {path}, line {number}: {problem}") from problem
        found.append(parse(Labelled, data, where=f"{path}, line {number}"))
    return found


def _rows(examples: Sequence[Labelled]) -> tuple[Array, Array, Neighbours]:
    if not examples:
        raise UserError("a router needs labelled answers: got none; make them with edgekit router label")
    for at, example in enumerate(examples):
        if len(example.features) != len(AFTER):
            raise UserError(
                f"a labelled answer must have {len(AFTER)} features: number {at} has {len(example.features)}"
            )
    vectors = [_vector(example.vector) for example in examples]
    if len({vector.size for vector in vectors}) != 1:
        raise UserError("labelled answers must have vectors of one embedder: theirs have different lengths")
    labels = np.array([float(example.wrong) for example in examples])
    return (
        np.array([example.features for example in examples], np.float64),
        labels,
        Neighbours(np.array(vectors, np.int8), labels),
    )


def _vector(text: str) -> Floats:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), np.int8).astype(np.float32)
    except ValueError as problem:
        raise UserError(f"a labelled answer's vector must be base64: {text!r:.40}: {problem}") from problem


def _thresholds(early: Array, late: Array, share: float) -> tuple[float, float]:
    """What hands over `share` of these answers: BEFORE_SHARE of them before a draft, the others after it."""
    never = 1.1  # a probability that none has
    first = round(BEFORE_SHARE * share * len(early))
    bar = float(np.sort(early)[-first]) if first else never
    rest = late[early < bar]
    more = min(round(share * len(early)) - (len(early) - len(rest)), len(rest))
    return bar, float(np.sort(rest)[-more]) if more > 0 else never


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"a router must be a file that can be read: {path}: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"a router must be JSON: {path}: {problem}") from problem
