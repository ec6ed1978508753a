"""The memory plan: what it adds up, and the refusal with its numbers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import DecoderSpec, LayerCache
from edgekit.errors import BudgetError
from edgekit.runtime.budget import BASE_BYTES, PREFILL_CHUNK, plan_memory

SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    target="portable",
    vocabulary=1000,
    context_length=8192,
    layers=(LayerCache(2, 64), LayerCache(1, 32)),
    eos_ids=(2,),
    resident_bytes=200_000_000,
    activation_bytes=10_000,
)
TOKEN_BYTES = 2 * 4 * (2 * 64 + 32)


def available(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr("edgekit.runtime.budget.available_bytes", lambda: size)


def test_the_parts_and_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    plan = plan_memory(SPEC, context=4096)
    assert plan.weights_bytes == 200_000_000
    assert plan.cache_bytes == 4096 * TOKEN_BYTES
    assert plan.activation_bytes == PREFILL_CHUNK * 10_000 + 4 * 1000
    assert plan.total_bytes == BASE_BYTES + plan.weights_bytes + plan.cache_bytes + plan.activation_bytes


def test_a_short_context_needs_the_activations_of_its_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    assert plan_memory(SPEC, context=10).activation_bytes == 10 * 10_000 + 4 * 1000


def test_it_refuses_one_byte_below_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    needed = plan_memory(SPEC, context=4096).total_bytes
    available(monkeypatch, needed)
    plan_memory(SPEC, context=4096).refuse_if_too_large()
    available(monkeypatch, needed - 1)
    with pytest.raises(BudgetError):
        plan_memory(SPEC, context=4096).refuse_if_too_large()


def test_the_refusal_says_the_numbers_and_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 295_000_000)
    with pytest.raises(BudgetError) as caught:
        plan_memory(SPEC, context=8192).refuse_if_too_large()
    message = str(caught.value)
    assert "it needs 301 MB" in message
    assert "weights 200 MB" in message
    assert "cache of 8192 tokens 10 MB" in message
    assert "295 MB are available" in message
    fits = re.search(r"pass --context (\d+)$", message)
    assert fits
    plan_memory(SPEC, context=int(fits[1])).refuse_if_too_large()
    assert int(fits[1]) > 3000


def test_when_no_context_fits_it_asks_for_a_smaller_model(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 100_000_000)
    with pytest.raises(BudgetError, match="use a smaller model"):
        plan_memory(SPEC, context=64).refuse_if_too_large()


def test_an_unknown_machine_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    plan_memory(SPEC, context=8192).refuse_if_too_large()


@given(st.integers(0, 10**10), st.integers(1, 8192))
def test_what_it_says_would_fit_does_fit(size: int, context: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        available(patch, size)
        plan = plan_memory(SPEC, context=context)
        if plan.total_bytes > size and plan.largest_context:
            assert plan.largest_context < context
            plan_memory(SPEC, context=plan.largest_context).refuse_if_too_large()
