"""Text streams: the pieces together are the decoded text, and each piece is final."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgekit.errors import UserError
from edgekit.runtime.text import TextStream

CORPUS = ["the quick brown fox jumps over the lazy dog", "Über naïve café 你好 世界", "for i in range(10): print(i)"]
SPECIAL = "<|end|>"
texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" aé你😀\ufffd")), max_size=40)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As SentencePiece models are: `▁` for a space, a space stripped at the start, bytes for unknown characters."""
    pieces = ["<s>", "▁", "▁hello", "▁world", "x", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


BYTE_LEVEL = _byte_level()
BYTE_FALLBACK = _byte_fallback()
END: int = BYTE_LEVEL.encode(SPECIAL).ids[0]


def run(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [stream.push(token) for token in tokens] + [stream.finish()]


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The definition: read character by character until one of the stop strings is complete; the longest if several."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(texts)
def test_pieces_are_the_text(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text).ids
    assert "".join(run(TextStream(BYTE_LEVEL), tokens)) == BYTE_LEVEL.decode(tokens) == text


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60))
@example(BYTE_LEVEL.encode("😀").ids[:3] * 30)
@example([BYTE_LEVEL.encode("😀").ids[1]] * 50 + BYTE_LEVEL.encode("é ok").ids)
def test_pieces_are_what_any_tokens_decode_to(tokens: list[int]) -> None:
    """Invalid bytes too, which models do produce."""
    assert "".join(run(TextStream(BYTE_LEVEL), tokens)) == BYTE_LEVEL.decode(tokens)


@pytest.mark.parametrize("garbage", range(40))
def test_text_goes_on_after_invalid_bytes(garbage: int) -> None:
    emoji = BYTE_LEVEL.encode("😀").ids
    tokens = emoji + [emoji[2]] * garbage + emoji + BYTE_LEVEL.encode("é").ids
    assert "".join(run(TextStream(BYTE_LEVEL), tokens)) == "😀" + "\ufffd" * garbage + "😀é"


@given(texts)
def test_no_piece_holds_half_a_character(text: str) -> None:
    pieces = run(TextStream(BYTE_LEVEL), BYTE_LEVEL.encode(text).ids)
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(texts)
def test_a_piece_waits_for_its_own_character_only(text: str) -> None:
    """Before an ASCII character everything is out: nothing is held longer than it must be."""
    stream = TextStream(BYTE_LEVEL)
    out = "".join(stream.push(token) for token in BYTE_LEVEL.encode(text).ids + BYTE_LEVEL.encode("|").ids)
    assert out == text + "|"


@given(texts, st.lists(st.text("abé😀 ", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_strings_end_the_text_at_the_first_one(text: str, stop: list[str], data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=2))
    for place in places:
        text = text[:place] + data.draw(st.sampled_from(stop)) + text[place:]
    stream = TextStream(BYTE_LEVEL, stop=stop)
    out = "".join(run(stream, BYTE_LEVEL.encode(text).ids))
    assert (out, stream.stopped) == cut(text, stop)


@given(texts, st.lists(st.text("abé😀 ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_never_take_back(text: str, stop: list[str]) -> None:
    """At each moment what is out begins every possible end of the text, the one that stops right here included."""
    stream, out = TextStream(BYTE_LEVEL, stop=stop), ""
    for token in BYTE_LEVEL.encode(text).ids:
        out += stream.push(token)
        assert cut(text, stop)[0].startswith(out)


@pytest.mark.parametrize(
    ("stop", "pieces", "out", "stopped"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ["a", "", "", "", "", ""], "END"),
        (["END"], ["a", "E", "N", "x", "E"], ["a", "", "", "ENx", "", "E"], None),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], "aab"),
        (["abc", "b"], ["abc"], ["a", ""], "b"),  # "b" is complete first, in one piece or in three
        (["abc", "b"], ["a", "b", "c"], ["", "a", "", ""], "b"),
        (["bc", "abc"], ["xabc"], ["x", ""], "abc"),  # both end here: the longest
        (["\n\n"], ["x\n", "\ny"], ["x", "", ""], "\n\n"),
    ],
)
def test_stop_strings_piece_by_piece(stop: list[str], pieces: list[str], out: list[str], stopped: str | None) -> None:
    stream = TextStream(lambda tokens: "".join(pieces[token] for token in tokens), stop=stop)
    assert run(stream, range(len(pieces))) == out
    assert stream.stopped == stopped


def test_an_emoji_comes_out_whole() -> None:
    tokens = BYTE_LEVEL.encode("a😀").ids
    assert len(tokens) == 5
    assert run(TextStream(BYTE_LEVEL), tokens) == ["a", "", "", "", "😀", ""]
    assert run(TextStream(BYTE_LEVEL), tokens[:-1]) == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize(
    ("tokens", "out"),
    [
        ([0, 2, 3], ["", "hello", " world", ""]),
        ([2, 0, 0, 3, 1, 4], ["hello", "", "", " world", " ", "x", ""]),
        ([1, 3, 5], ["", " world", ".", ""]),
        ([2, *(6 + byte for byte in "你é".encode()), 3], ["hello", "", "", "你", "", "é", " world", ""]),
        ([6 + 0xC3, 0, 0, 0, 0, 6 + 0xA9], ["", "", "", "", "", "é", ""]),
        ([2, *(6 + byte for byte in "你".encode()[:2]), 3], ["hello", "", "", "\ufffd\ufffd world", ""]),
    ],
)
def test_spaces_and_bytes_of_a_sentencepiece_model(tokens: list[int], out: list[str]) -> None:
    assert run(TextStream(BYTE_FALLBACK), tokens) == out
    assert "".join(out) == BYTE_FALLBACK.decode(tokens)


@given(st.lists(st.sampled_from(["<s>", "▁", "▁hello", "x", "你", "😀", "é"]), max_size=30))
def test_pieces_of_a_sentencepiece_model_are_the_text(parts: list[str]) -> None:
    tokens = []
    for part in parts:
        token = BYTE_FALLBACK.token_to_id(part)
        tokens += [6 + byte for byte in part.encode()] if token is None else [token]
    assert "".join(run(TextStream(BYTE_FALLBACK), tokens)) == BYTE_FALLBACK.decode(tokens)


def test_special_tokens_are_text_when_asked_for() -> None:
    tokens = [*BYTE_LEVEL.encode("a").ids, END]
    assert run(TextStream(BYTE_LEVEL), tokens) == ["a", "", ""]
    assert run(TextStream(BYTE_LEVEL, skip_special_tokens=False), tokens) == ["a", SPECIAL, ""]
    stream = TextStream(BYTE_LEVEL, skip_special_tokens=False, stop=[SPECIAL])
    assert (run(stream, tokens), stream.stopped) == (["a", "", ""], SPECIAL)


@pytest.mark.parametrize(
    "token", [BYTE_LEVEL.encode(" the").ids[-1], BYTE_LEVEL.encode("😀").ids[1], BYTE_LEVEL.encode("😀").ids[0], END]
)
@pytest.mark.parametrize("given_a_function", [True, False])
def test_a_token_costs_the_same_after_many(token: int, given_a_function: bool) -> None:
    """Counted in tokens decoded, for text, invalid bytes, beginnings without an end, and special tokens."""
    decoded = 0
    stream = TextStream((lambda tokens: str(BYTE_LEVEL.decode(tokens))) if given_a_function else BYTE_LEVEL)
    decode = stream._decode

    def counting(tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return decode(tokens)

    stream._decode = counting
    tokens = [token] * 500
    assert "".join(run(stream, tokens)) == BYTE_LEVEL.decode(tokens)
    assert decoded <= 32 * len(tokens)


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(BYTE_LEVEL, stop=["b"])
    run(stream, BYTE_LEVEL.encode("ab").ids)
    assert [stream.push(token) for token in BYTE_LEVEL.encode("cd").ids] == ["", ""]
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="a stop string must not be empty"):
        TextStream(BYTE_LEVEL, stop=["a", ""])
