"""Sampling: the support and distribution that each filter leaves, determinism, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.kernels.peak import LOWEST
from edgekit.runtime.sampling import Sampler, Sampling, filtered_probabilities

# Probabilities 0.4, 0.3, 0.2, 0.1 for tokens 2, 0, 3, 1.
FOUR = np.log(np.array([0.3, 0.1, 0.4, 0.2], dtype=np.float32))

# Multiples of 1/1024: logits that differ by less than float32 can show in exp(difference) are ties.
steps = st.integers(-30 * 1024, 30 * 1024).map(lambda step: step / 1024)
logit_rows = arrays(np.float32, st.integers(1, 300), elements=steps)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)


def support(logits: NDArray[np.float32], sampling: Sampling, history: list[int] | None = None) -> list[int]:
    return list(filtered_probabilities(logits, history or [], sampling)[0].tolist())


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0.*got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0.*got -1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_window": 0}, "repetition_window"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_value_out_of_range_is_refused(wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {2: 1.0}),
        (Sampling(1.0), {0: 0.3, 1: 0.1, 2: 0.4, 3: 0.2}),
        (Sampling(1.0, top_k=2), {0: 3 / 7, 2: 4 / 7}),
        (Sampling(1.0, top_k=9), {0: 0.3, 1: 0.1, 2: 0.4, 3: 0.2}),
        (Sampling(1.0, top_p=0.65), {0: 3 / 7, 2: 4 / 7}),  # 0.4 + 0.3 reaches 0.65
        (Sampling(1.0, top_p=0.75), {0: 3 / 9, 2: 4 / 9, 3: 2 / 9}),
        (Sampling(1.0, min_p=0.45), {0: 3 / 9, 2: 4 / 9, 3: 2 / 9}),  # at least 0.18
        (Sampling(0.5), {0: 9 / 30, 1: 1 / 30, 2: 16 / 30, 3: 4 / 30}),
        # The order shows: of top-k's two, 4/7 reaches 0.5 alone; of all four, 0.4 would not.
        (Sampling(1.0, top_k=2, top_p=0.5), {2: 1.0}),
        # Temperature comes before top-p: 16/30 reaches 0.5, 0.4 would not.
        (Sampling(0.5, top_p=0.5), {2: 1.0}),
        # And top-p before min-p: of all, 0.4 + 0.3 + 0.2 are needed for 0.75, of which min-p then leaves two.
        (Sampling(1.0, top_p=0.75, min_p=0.7), {0: 3 / 7, 2: 4 / 7}),
    ],
)
def test_exact_distributions(sampling: Sampling, expected: dict[int, float]) -> None:
    ids, probabilities = filtered_probabilities(FOUR, [], sampling)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    ("history", "window", "expected"),
    [
        ([], 8, [1.0, -1.0, 3.0]),
        ([0], 8, [0.5, -1.0, 3.0]),
        ([1, 1, 1], 8, [1.0, -2.0, 3.0]),  # once, however often
        ([0, 1, 2], 8, [0.5, -2.0, 1.5]),
        ([0, 1, 2], 1, [1.0, -1.0, 1.5]),  # only the last token is in the window
    ],
)
def test_repetition_penalty(history: list[int], window: int, expected: list[float]) -> None:
    logits = np.array([1.0, -1.0, 3.0], dtype=np.float32)
    sampling = Sampling(1.0, repetition_penalty=2.0, repetition_window=window)
    _, probabilities = filtered_probabilities(logits, history, sampling)
    weights = np.exp(expected)
    np.testing.assert_allclose(probabilities, weights / weights.sum(), rtol=1e-6)


def test_the_penalty_acts_on_greedy_choices_too() -> None:
    logits = np.array([1.0, 1.5], dtype=np.float32)
    assert Sampler(Sampling())(logits, [1]) == 1
    assert Sampler(Sampling(repetition_penalty=2.0))(logits, [1]) == 0


@pytest.mark.parametrize("token", [-1, 4, 2**40])
def test_a_history_of_another_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(ModelError, match=f"got token {token} of 4"):
        Sampler(Sampling(repetition_penalty=1.1))(FOUR, [0, token])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 0.9, 0.1, 1.1)])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, math.nan, 9.0], "got nan for token 1 of 3"),
        ([0.0, 1.0, math.inf], "got inf for token 2 of 3"),
        ([-math.inf] * 3, "-inf for all 3 logits"),
        ([], r"shape \(0,\)"),
        ([[0.0, 1.0]], r"shape \(1, 2\)"),
    ],
)
def test_collapsed_logits_are_named(sampling: Sampling, logits: list[Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Sampler(sampling)(np.array(logits, dtype=np.float32), [0])


def test_an_impossible_token_is_never_in_the_support() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf, 1.0], dtype=np.float32)
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.999)):
        assert support(logits, sampling) == [1, 3]


@pytest.mark.filterwarnings("error")
def test_extreme_logits_and_temperatures_stay_quiet() -> None:
    logits = np.array([-3e38, 3e38, 3e38, 0.0], dtype=np.float32)
    assert support(logits, Sampling(1e-40)) == [1, 2]
    assert support(logits, Sampling(1.0, repetition_penalty=1e30), [0]) == [1, 2]
    assert Sampler(Sampling(1e-300)).choose(logits, []).logprob == pytest.approx(-math.log(2))


def test_ties_top_k_keeps_all_and_top_p_the_lower_ids() -> None:
    equal = np.zeros(1000, dtype=np.float32)
    assert support(equal, Sampling(1.0, top_k=3)) == list(range(1000))
    assert support(equal, Sampling(1.0, top_p=0.25)) == list(range(250))
    assert support(equal, Sampling(1.0, top_p=1e-9)) == [0]
    assert Sampler(Sampling())(equal, []) == 0


@given(logits=logit_rows, sampling=samplings)
def test_what_is_left_is_a_distribution_that_holds_the_greedy_token(
    logits: NDArray[np.float32], sampling: Sampling
) -> None:
    before = logits.copy()
    ids, probabilities = filtered_probabilities(logits, [], sampling)
    np.testing.assert_array_equal(logits, before)
    assert (np.diff(ids) > 0).all()
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1)
    assert logits.argmax() in ids


@given(logits=logit_rows, sampling=samplings, seed=st.integers(0, 99))
def test_one_is_greedy(logits: NDArray[np.float32], sampling: Sampling, seed: int) -> None:
    greedy = Sampler(Sampling())(logits, [])
    assert Sampler(replace(sampling, top_p=1e-6, seed=seed))(logits, []) == greedy
    # Tokens equal to the greedy one stay with top-k and min-p.
    assert logits[Sampler(replace(sampling, top_k=1, seed=seed))(logits, [])] == logits[greedy]
    assert logits[Sampler(Sampling(0.01, min_p=1.0, seed=seed))(logits, [])] == logits[greedy]


@given(logits=logit_rows, sampling=samplings, other=samplings)
def test_a_stricter_filter_leaves_less(logits: NDArray[np.float32], sampling: Sampling, other: Sampling) -> None:
    wide = set(support(logits, sampling))
    stricter = min(sampling.top_k or 99, other.top_k or 99)
    assert set(support(logits, replace(sampling, top_k=stricter, top_p=1.0))) <= set(
        support(logits, replace(sampling, top_p=1.0))
    )
    assert set(support(logits, replace(sampling, top_p=min(sampling.top_p, other.top_p)))) <= wide
    assert set(support(logits, replace(sampling, min_p=max(sampling.min_p, other.min_p)))) <= wide


@given(logits=logit_rows, temperature=st.floats(0.1, 4), top_p=st.floats(0.01, 0.999))
def test_the_nucleus_equals_the_one_of_a_full_sort(
    logits: NDArray[np.float32], temperature: float, top_p: float
) -> None:
    ids, _ = filtered_probabilities(logits, [], Sampling(temperature, top_p=top_p))
    everything, probabilities = filtered_probabilities(logits, [], Sampling(temperature))
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    sure = set(everything[order[before < top_p - 1e-6]].tolist())
    possible = set(everything[order[before < top_p + 1e-6]].tolist())
    assert sure <= set(ids.tolist()) <= possible


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_draws_fall_on_every_token_as_often_as_they_should(size: int) -> None:
    """Not statistics: with as many equidistant numbers as tokens, each of equal tokens is drawn once."""

    class Equidistant:
        def __init__(self) -> None:
            self.drawn = -0.5

        def random(self) -> float:
            self.drawn += 1
            return self.drawn / size

    sampler = Sampler(Sampling(1.0))
    sampler._random = Equidistant()  # type: ignore[assignment]
    assert [sampler(np.zeros(size, dtype=np.float32), []) for _ in range(size)] == list(range(size))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@given(logits=logit_rows, sampling=samplings)
def test_the_ends_of_the_interval_fall_on_tokens_of_the_support(
    uniform: float, logits: NDArray[np.float32], sampling: Sampling
) -> None:
    class Fixed:
        def random(self) -> float:
            return uniform

    sampler = Sampler(sampling)
    sampler._random = Fixed()  # type: ignore[assignment]
    ids, probabilities = filtered_probabilities(logits, [], sampling)
    if sampling.top_k > 0 or sampling.top_p < 1:  # then draws go through the tokens by falling probability
        order = np.argsort(-probabilities, kind="stable")
        ids, probabilities = ids[order], probabilities[order]
    drawn = sampler(logits, [])
    if uniform == 0:
        assert drawn == ids[0]
    else:  # what lies above it is too rare for the last number below one to reach
        assert drawn in ids
        assert probabilities[ids.tolist().index(drawn) + 1 :].sum() < 2**-50


@settings(max_examples=20)
@given(logits=logit_rows, sampling=samplings, seed=st.integers(0, 2**63))
def test_a_seed_repeats(logits: NDArray[np.float32], sampling: Sampling, seed: int) -> None:
    runs = []
    for _ in range(2):
        sampler = Sampler(replace(sampling, seed=seed))
        runs.append([sampler(logits, []) for _ in range(20)])
    assert runs[0] == runs[1]
    assert set(runs[0]) <= set(support(logits, sampling))


def test_seeds_differ() -> None:
    flat = np.zeros(1000, dtype=np.float32)
    drawn = {tuple(Sampler(Sampling(1.0, seed=seed))(flat, []) for _ in range(1)) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 0.9, 0.1, 1.3, seed=3)])
def test_logprob_is_that_of_the_raw_logits(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 1000).astype(np.float32)
    choice = Sampler(sampling).choose(logits, [4, 5])
    assert choice.token == Sampler(sampling)(logits, [4, 5])
    exact = logits.astype(np.float64)
    assert choice.logprob == pytest.approx(exact[choice.token] - math.log(np.exp(exact).sum()), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=40),
        Sampling(1.3, top_p=0.9),
        Sampling(1.0, min_p=0.05),
        Sampling(0.8, 50, 0.95, 0.02, 1.2),
        Sampling(1.5, 200, 0.5, 0.0, 0.8),
    ],
)
def test_the_distribution_equals_that_of_transformers(sampling: Sampling, scale: float) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    chain = [
        process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        process.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        chain.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(process.MinPLogitsWarper(sampling.min_p))

    random = np.random.default_rng(7)
    for _ in range(20):
        logits = (random.normal(size=3000) * scale).astype(np.float32)
        history = random.integers(0, logits.size, 100).tolist()
        scores = torch.from_numpy(logits.copy())[None].double()
        for step in chain:
            scores = step(torch.tensor([history]), scores)
        expected = torch.softmax(scores, dim=-1)[0].numpy()
        ids, probabilities = filtered_probabilities(logits, history, sampling)
        in_reach = expected >= expected.max() * LOWEST
        assert ids.tolist() == np.flatnonzero(in_reach).tolist()
        np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-4)
