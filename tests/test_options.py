import dataclasses

import pytest

from edgekit.errors import UserError
from edgekit.profile.options import Options

FULL = Options(
    prompt_tokens=8, generate_tokens=4, repetitions=3, context=64, threads=2, settle_s=0.5, idle_s=2.0,
    prompts=("a b",), depths=(0, 16), sweep_threads=(1, 2), operators=False, power="rapl", estimate_w=(6.0, 2.0),
    grid_g_per_kwh=400.0, price_per_kwh=0.3, seed=7,
)  # fmt: skip


@pytest.mark.parametrize("options", [Options(), FULL])
def test_json_round_trip(options):
    assert Options.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[" * 10**5, "must be JSON"),
        ('{"promt_tokens": 3}', "did you mean 'prompt_tokens'"),
        ('{"repetitions": 0}', "--repeat must be at least 1: got 0"),
        ('{"depths": ["x"]}', "must be an integer"),
    ],
)
def test_foreign_options_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        Options.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt must be at least 1"),
        ({"generate_tokens": -5}, "--generate must be at least 1: got -5"),
        ({"settle_s": -1.0}, "--settle must be from 0"),
        ({"idle_s": float("nan")}, "--idle must be from 0"),
        ({"grid_g_per_kwh": -3.0}, "--grid must be from 0"),
        ({"depths": (-1,)}, "--depths must not be below 0"),
        ({"sweep_threads": (0,)}, "--sweep-threads must be from 1"),
        ({"estimate_w": (3.0,)}, "--estimate needs watts under load and at rest"),
        ({"estimate_w": (2.0, 3.0)}, "the first not below the second: got 2.0, 3.0"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(FULL, **changes)


@pytest.mark.parametrize(
    ("context", "prompt", "generate"), [(8192, 512, 128), (1024, 512, 128), (256, 128, 64), (8, 4, 2), (2, 1, 1)]
)
def test_what_is_left_open_fits_any_context(context, prompt, generate):
    fitted = Options().fit(context)
    assert (fitted.prompt_tokens, fitted.generate_tokens) == (prompt, generate)


def test_what_was_asked_for_is_kept_or_refused():
    assert Options(prompt_tokens=31, generate_tokens=31).fit(32).prompt_tokens == 31
    with pytest.raises(UserError, match="below the context of 32 tokens: got 32 and 8"):
        Options(prompt_tokens=32).fit(32)
    with pytest.raises(UserError, match="--depths must leave room for 32 tokens in the context of 64: got 40"):
        Options(depths=(40,)).fit(64)
