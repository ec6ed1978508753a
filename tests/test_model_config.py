"""config.json of the Llama family, as transformers 4 and 5 write it, and as nobody should."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import ModelError
from edgekit.model.config import ARCHITECTURES, DecoderConfig, Rope, decoder_config

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes: Any) -> DecoderConfig:
    """The plain config with some keys changed; None removes one."""
    return decoder_config({key: value for key, value in {**PLAIN, **changes}.items() if value is not None})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_config(architecture: str) -> None:
    assert read(architectures=[architecture]) == DecoderConfig(
        architecture=architecture,
        hidden_size=64,
        layers=2,
        head_dim=16,
        vocabulary=384,
        context_length=256,
        norm_eps=1e-5,
        rope=Rope(10000.0),
        tied=True,
        sliding_window=None,
        bos_id=1,
        eos_ids=(2,),
    )


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"head_dim": 32}, "head_dim", 32),
        ({"tie_word_embeddings": None}, "tied", False),
        ({"rms_norm_eps": None}, "norm_eps", 1e-6),
        ({"eos_token_id": [2, 0]}, "eos_ids", (2, 0)),
        ({"eos_token_id": None}, "eos_ids", ()),
        ({"bos_token_id": None}, "bos_id", None),
        ({"architectures": ["Other", "Qwen3ForCausalLM"]}, "architecture", "Qwen3ForCausalLM"),
        # rope, as transformers 4 wrote it
        ({"rope_parameters": None}, "rope", Rope(10000.0)),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope", Rope(5e5)),
        ({"rope_parameters": None, "rope_theta": 500000}, "rope", Rope(5e5)),
        (
            {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope",
            Rope(5e5, "linear", 2.0),
        ),
        (
            {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            "rope",
            Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
        ),
        # and as 5 does
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            "rope",
            Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
        ),
        # windows: Mistral's counts, Qwen's only when it says so
        ({"sliding_window": 128}, "sliding_window", 128),
        ({"sliding_window": 128, "model_type": "mistral"}, "sliding_window", 128),
        ({"sliding_window": 128, "model_type": "qwen2"}, "sliding_window", None),
        ({"sliding_window": 128, "use_sliding_window": False}, "sliding_window", None),
        ({"sliding_window": 128, "use_sliding_window": True, "model_type": "qwen2"}, "sliding_window", 128),
        ({"sliding_window": 128, "layer_types": ["full_attention"] * 2}, "sliding_window", None),
        ({"sliding_window": 128, "layer_types": ["sliding_attention"] * 2}, "sliding_window", 128),
    ],
)
def test_one_fact(changes: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(read(**changes), name) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "must be one of LlamaForCausalLM, .* config.json says GPT2LMHeadModel",
        ),
        ({"architectures": None}, "config.json says nothing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list: got 'LlamaForCausalLM'"),
        ({"hidden_act": "gelu"}, "must be silu: config.json says 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config; take the original model"),
        ({"hidden_size": None}, "hidden_size must be a positive integer: got None"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer: got 0"),
        ({"hidden_size": -64}, "hidden_size must be a positive integer: got -64"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer: got 64.0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer: got True"),
        ({"num_attention_heads": 5}, "hidden_size must divide by 5 heads: got 64"),
        ({"head_dim": -1}, "head_dim must be a positive integer: got -1"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number: got '1e-5'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number: got nan"),
        ({"rope_parameters": [1]}, "rope_parameters must be a table"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling must be one of .* says 'longrope'"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be a positive number: got inf"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must be a positive number: got 0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "original_max_position_embeddings must be a positive integer"),
        (
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor must be below high_freq_factor: got 4.0 and 4.0",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id must be one or more token ids: got '</s>'"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be one or more token ids"),
        ({"bos_token_id": 1.0}, "bos_token_id must be one or more token ids"),
        ({"sliding_window": "4096"}, "sliding_window must be a positive integer: got '4096'"),
        (
            {"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]},
            "must be the same in all layers",
        ),
        ({"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}, "must be the same in all layers"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


KEYS = [*PLAIN, "head_dim", "rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "rope_theta", "factor", *LLAMA3]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_config_or_our_error(changes: dict[str, Any]) -> None:
    try:
        config = decoder_config({**PLAIN, **changes})
    except ModelError:
        return
    assert min(config.hidden_size, config.layers, config.head_dim, config.vocabulary, config.context_length) > 0
    assert config.rope.theta > 0
    assert config.rope.factor > 0
