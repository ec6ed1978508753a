"""From a stream of tokens to a stream of text.

Text is given out as soon as it is certain, and never before: half a character waits for its other half (a byte-level
or byte-fallback tokenizer splits characters), and what could be the beginning of a stop string waits until it is not.

Different from `tokenizers.decoders.DecodeStream`: it ends (`finish` gives what a text that was cut off left behind),
knows stop strings, and takes the same time for each token also in a run of invalid bytes or of special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from edgekit.errors import UserError

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or not yet
_PATIENCE = 12  # tokens without a settled end after which the window is cut


class TextStream:
    """The text of one generated sequence.

    `decode`: a tokenizer, or a function from a list of token ids to their text that is consistent: text only grows at
    its end, but for U+FFFD there. `stop`: strings that end the text. `skip_special_tokens`: for a tokenizer only.
    `stopped` is the stop string that ended the text, None so far: the one that is complete first; of several that end
    together, the longest.
    Raises UserError for an empty stop string.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str] | Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        if "" in stop:
            raise UserError(f"a stop string must not be empty: got {list(stop)}")
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._held = ""  # certain text that may be the beginning of a stop string
        self._decode, self._silent = _decoder(decode, skip_special_tokens)
        # The tokens that are still decoded: `_context` of them, whose text is out, so that the next ones get the space
        # before them; then those of which no end is certain yet. `_given` characters of their common text are out.
        self._window: list[int] = []
        self._context = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` makes certain, often none. Nothing after a stop string."""
        if self.stopped is not None or token in self._silent:
            return ""
        return self._release(self._settled(token), last=False)

    def finish(self) -> str:
        """The rest of the text: what waited for a character or a stop string that did not come."""
        rest = self._decode(self._window)[self._given :] if self._window else ""
        self._window, self._context, self._given = [], 0, 0
        return "" if self.stopped is not None else self._release(rest, last=True)

    def _settled(self, token: int) -> str:
        """Decodes the window with one more token; returns the new text up to what later tokens may change."""
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._context
        open_end = len(text) - len(text.rstrip(_REPLACEMENT))
        if pending > 3:  # a token is at least a byte, and three bytes are all that may lack the fourth
            open_end = min(open_end, 3)
        end = max(len(text) - open_end, self._given)
        new, self._given = text[self._given : end], end

        if new and not open_end:
            # A clean end: the last piece becomes the context, all before it is done with.
            self._keep(self._window[self._context :], open_end)
            self._context = len(self._window)
        elif pending > _PATIENCE and not open_end:
            self._window.pop()  # it adds nothing: a token that the function leaves out
        elif pending > _PATIENCE:
            self._keep(self._window[-_PATIENCE:], open_end)  # invalid bytes
            self._context = 0
        return new

    def _keep(self, window: list[int], open_end: int) -> None:
        self._window = window
        self._given = len(self._decode(window)) - open_end

    def _release(self, text: str, *, last: bool) -> str:
        """What of the held text and `text` is before a stop string and cannot be the beginning of one."""
        text = self._held + text
        complete = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if complete:
            _, at, self.stopped = min(complete)
            self._held = ""
            return text[:at]
        held = 0 if last else self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _beginning(self, text: str) -> int:
        """The length of the longest end of `text` that is the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def _decoder(
    decode: Callable[[list[int]], str] | Tokenizer, skip_special_tokens: bool
) -> tuple[Callable[[list[int]], str], frozenset[int]]:
    """The function that decodes, and the tokens that it leaves out: in a window they would count as bytes to come."""
    if not isinstance(decode, Tokenizer):
        return decode, frozenset()
    tokenizer = decode
    added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
    silent = frozenset(token for token, content in added.items() if content.special)
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)), silent


def whole(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, told to encode all of a text: some files ask for cutting or padding, which would be silent here."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
