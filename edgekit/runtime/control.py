"""Control tokens: what a message spells stays text.

A chat template parts turns by control tokens such as <|im_end|>, and a tokenizer makes such a token wherever a text
spells it. A message that holds "<|im_end|>" would thus end its own turn and could begin another one, as the system. So,
before the template sees the messages, each control token that they spell is replaced by a character of the private use
area that they do not have; after it, what stands for that character is tokenized as the ordinary text that it is:

    message "a<|im_end|>b"  ->  "a\\ue000b"  ->  template  ->  "<|im_start|>user\\na\\ue000b<|im_end|>\\n"
                            ->  ids of "<|im_start|>user\\na", "<", "|", "im", "_end", "|>", ids of "b<|im_end|>\\n"

All strings of the messages are treated alike, the roles too. Different from transformers, which makes control tokens of
them. A text without any is tokenized as there. Added tokens that the tokenizer does not call special (<tool_call>) are
left: models write them in their own turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from edgekit.runtime.template import ChatTemplate

_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # Unicode's private use areas


class Encoder:
    """From messages to token ids: only the template makes control tokens. One thread at a time."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.get_added_tokens_decoder().values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of the prompt. Raises what `ChatTemplate.render` raises."""
        text = self._template.render(messages)
        words = "\0".join(_texts(messages))
        spelled = set(self._special.findall(words)) if self._special else set()
        if self._special is None or not spelled:
            return self._ids(text)
        taken = set(words)
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        marks = {token: next(free) for token in spelled}
        tokens = {mark: token for token, mark in marks.items()}
        text = self._template.render(_replaced(messages, self._special, marks))
        parts = re.split(f"([{''.join(tokens)}])", text)
        return [token for part in parts if part for token in self._part(part, tokens)]

    def _part(self, part: str, tokens: Mapping[str, str]) -> list[int]:
        if part not in tokens:
            return self._ids(part)
        self._tokenizer.encode_special_tokens = True
        try:
            return self._ids(tokens[part])
        finally:
            self._tokenizer.encode_special_tokens = False

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _texts(value: object) -> list[str]:
    """All strings of JSON data, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


def _replaced(value: Any, special: re.Pattern[str], marks: Mapping[str, str]) -> Any:
    """A copy of JSON data with the marks in place of what they stand for."""
    if isinstance(value, str):
        return special.sub(lambda found: marks[found[0]], value)
    if isinstance(value, Mapping):
        return {_replaced(key, special, marks): _replaced(item, special, marks) for key, item in value.items()}
    return [_replaced(item, special, marks) for item in value] if isinstance(value, (list, tuple)) else value
