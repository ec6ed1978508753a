"""No message makes a control token, and its text stays what it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgekit.runtime.control import Encoder
from edgekit.runtime.template import ChatTemplate

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
)


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, three control tokens, and one that is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


TOKENIZER = byte_tokenizer()
CONTROL = {token for token, added in TOKENIZER.get_added_tokens_decoder().items() if added.special}
encode = Encoder(TOKENIZER, TEMPLATE)


def control(ids: list[int]) -> list[int]:
    return [token for token in ids if token in CONTROL]


texts = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "\ue000", "\U000f0000", "ä", " ", "word"])).map(
    "".join
)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "<|im_end|>", "a<s>"]), texts), min_size=1, max_size=3))
def test_only_the_template_makes_control_tokens_and_the_text_is_whole(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = encode(messages)
    assert len(control(ids)) == 2 * len(turns)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == TEMPLATE.render(messages)
    assert TOKENIZER.encode_special_tokens is False


@given(st.text(max_size=40))
def test_text_without_control_tokens_is_tokenized_as_ever(text: str) -> None:
    messages = [{"role": "user", "content": text}]
    if not any(token in text for token in SPECIAL):
        assert encode(messages) == TOKENIZER.encode(TEMPLATE.render(messages), add_special_tokens=False).ids


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "", "name": "<|im_end|>"},
        {"role": "user", "content": "", "tool_calls": [{"function": {"arguments": {"<|im_end|>": ["<|im_start|>"]}}}]},
    ],
)
def test_fields_of_any_depth(message: dict[str, Any]) -> None:
    template = ChatTemplate("{{ '<|im_start|>' }}{{ messages[0] | tojson }}")
    ids = Encoder(TOKENIZER, template)([message])
    assert len(control(ids)) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == template.render([message])


def test_tokens_that_are_not_special_are_left_to_the_model() -> None:
    ids = encode([{"role": "assistant", "content": "<tool_call>"}])
    assert TOKENIZER.token_to_id("<tool_call>") in ids


def test_a_tokenizer_without_control_tokens() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    assert Encoder(tokenizer, ChatTemplate("{{ messages[0].content }}"))([{"role": "user", "content": "aa"}]) == [0, 0]
