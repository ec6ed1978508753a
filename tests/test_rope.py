"""Rotary embedding: golden frequencies, the algebra of rotations, and transformers' own tables."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UserError
from edgekit.model.config import Rope
from edgekit.model.rope import frequencies, tables

LLAMA3 = Rope(500000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
# Llama 3.1 8B's frequencies at head_dim 128, as transformers 5 computes them in float32: kept, blended, stretched.
LLAMA3_GOLDEN = {
    0: 1.0,
    1: 0.8146172165870667,
    28: 0.0032114461064338684,
    29: 0.0021665706299245358,
    31: 0.0008567514596506953,
    33: 0.0003126936499029398,
    35: 9.556212171446532e-05,
    36: 7.784655463183299e-05,
    63: 3.068925877869333e-07,
}
KINDS = [Rope(10000.0), Rope(10000.0, "linear", factor=4.0), LLAMA3]


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (Rope(10000.0), [1.0, 0.1, 0.01, 0.001]),
        (Rope(10000.0, "linear", factor=4.0), [0.25, 0.025, 0.0025, 0.00025]),
        (Rope(625.0), [1.0, 0.2, 0.04, 0.008]),
    ],
)
def test_frequencies_are_powers_of_theta(rope: Rope, expected: list[float]) -> None:
    np.testing.assert_allclose(frequencies(rope, 8), expected, rtol=1e-14)


def test_llama3_bands() -> None:
    found = frequencies(LLAMA3, 128)
    np.testing.assert_allclose([found[i] for i in LLAMA3_GOLDEN], list(LLAMA3_GOLDEN.values()), rtol=1e-6)


def test_llama3_keeps_short_waves_and_stretches_long_ones_by_its_factor() -> None:
    plain, found = frequencies(Rope(LLAMA3.theta), 128), frequencies(LLAMA3, 128)
    turns = LLAMA3.original_context * plain / (2 * np.pi)
    short, long = turns > LLAMA3.high_freq_factor, turns < LLAMA3.low_freq_factor
    assert short.any()
    assert long.any()
    assert np.array_equal(found[short], plain[short])
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=1e-15)
    assert np.all(np.diff(found) < 0)


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: rope.kind)
def test_tables_hold_cosine_and_sine_of_each_angle(rope: Rope) -> None:
    cos, sin = tables(rope, 16, 100)
    assert cos.shape == sin.shape == (100, 8)
    assert cos.dtype == sin.dtype == np.float32
    angle = 77 * frequencies(rope, 16)[3]
    assert (cos[77, 3], sin[77, 3]) == (np.float32(np.cos(angle)), np.float32(np.sin(angle)))
    assert np.array_equal(cos[0], np.ones(8))
    assert not sin[0].any()


def test_far_positions_keep_their_precision() -> None:
    """In float32 an angle of 131071 radians is off by up to 0.004; ours is rounded once, at the end."""
    cos, _ = tables(Rope(500000.0), 2, 131072)
    assert abs(float(cos[131071, 0]) - np.cos(131071.0)) < 1e-7


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 99), st.sampled_from(KINDS))
def test_products_depend_on_the_distance_alone(m: int, n: int, shift: int, rope: Rope) -> None:
    cos, sin = (table.astype(np.float64) for table in tables(rope, 16, 500))
    rng = np.random.default_rng(m * 401 + n)
    q, k = rng.standard_normal((2, 8)), rng.standard_normal((2, 8))

    def product(at: int, other: int) -> float:
        """<R(at) q, R(other) k>, with a pair of channels as the real and imaginary part of a number."""
        turned_q = (q[0] + 1j * q[1]) * (cos[at] + 1j * sin[at])
        turned_k = (k[0] + 1j * k[1]) * (cos[other] + 1j * sin[other])
        return float((turned_q * turned_k.conj()).real.sum())

    assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_equal_transformers(rope: Rope, head_dim: int) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    table = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }
    wanted = {"default": 2, "linear": 3, "llama3": 6}[rope.kind]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(list(table.items())[:wanted]),
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(frequencies(rope, head_dim), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "beta_fast": 16.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.9}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
    ],
)
def test_stretched_angles_equal_those_of_transformers(table: dict[str, Any], context: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from edgekit.model.config import decoder_config

    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": 10000.0, **table},
    )
    module = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding(config)
    cosine, sine = module(torch.zeros(1, 100, 256), torch.arange(100)[None])
    ours = tables(decoder_config(config.to_dict()).rope, 64, 100)
    for theirs, mine in zip((cosine, sine), ours, strict=True):
        np.testing.assert_allclose(mine, theirs[0, :, :32].numpy(), atol=2e-5)


def test_a_config_is_stretched_once() -> None:
    from edgekit.model.config import decoder_config, stretched

    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 10,
        "max_position_embeddings": 100,
        "rope_theta": 5000.0,
    }
    longer = decoder_config(stretched(config, "yarn", 4))
    assert (longer.context_length, longer.rope.kind, longer.rope.theta) == (400, "yarn", 5000.0)
    assert longer.rope.original_context == 100
    plain, ntk = decoder_config(config).rope, decoder_config(stretched(config, "ntk", 4)).rope
    ratio = frequencies(plain, 64) / frequencies(ntk, 64)
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(4)
    with pytest.raises(UserError, match="not stretched yet"):
        stretched(stretched(config, "linear", 2), "yarn", 4)
    with pytest.raises(UserError, match="must be linear, ntk or yarn"):
        stretched(config, "cubic", 2)
    with pytest.raises(UserError, match="above 1"):
        stretched(config, "yarn", 1)
