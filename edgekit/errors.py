"""Every error a user can meet, and the exit code it ends the command line with.

A message says the rule, the offending value, the place, and the way out, in lower case:
`block size must divide 32: got 48 (recipe.toml, steps[0].block); use 32, 64 or 128`.
"""

from __future__ import annotations

from typing import ClassVar


class EdgekitError(Exception):
    """Base of all errors that edgekit raises on purpose. `exit_code` is the process's exit status."""

    exit_code: ClassVar[int] = 1


class UserError(EdgekitError):
    """The request is wrong: a missing file, an unknown key, an option out of range."""

    exit_code: ClassVar[int] = 2


class ModelError(EdgekitError):
    """The model or folder is wrong: truncated, foreign, of an unknown architecture, or its outputs collapsed."""

    exit_code: ClassVar[int] = 3


class BudgetError(EdgekitError):
    """It does not fit: memory, disk or context."""

    exit_code: ClassVar[int] = 4


class DeviceError(EdgekitError):
    """The machine failed: runtime, kernel, sensor or remote host."""

    exit_code: ClassVar[int] = 5


class ContextOverflow(BudgetError):
    """The prompt is longer than the context. Nothing was cut.

    `prompt_tokens` and `limit` are token counts; `would_need_bytes` is the cache that the prompt would take.
    """

    def __init__(self, prompt_tokens: int, limit: int, would_need_bytes: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        self.would_need_bytes = would_need_bytes
        super().__init__(
            f"the prompt must fit in the context: {prompt_tokens} tokens, limit {limit}"
            f" (it would need {would_need_bytes / 1e6:.0f} MB of cache); shorten it or raise --context"
        )
