"""Tokenizers rebuilt from GGUF metadata: the ids of the published tokenizers, on strings that break careless ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, tiny_gguf, tiny_tokenizer
from tokenizers import Tokenizer, pre_tokenizers

from edgekit.errors import ModelError
from edgekit.model.gguf_file import read_gguf
from edgekit.model.gguf_tokenizer import RULES, tokenizer_assets
from edgekit.model.sources import open_model

AWKWARD = [
    "",
    " ",
    "Hello world",
    "  leading, trailing  ",
    "a  b   c    d",
    "\t\ttabs\n\nnewlines\r\n\r\nand all \n \t ",
    "1234567",
    "  123",
    "a\n\n1",
    "x = 3.14159e-10; y = 1,234.56",
    "²½Ⅷ٣",
    "it's we'LL I'M don’t",
    "def f(x):\n    return x ** 2  # square\n",
    "<html><body class='x'>&amp;</body></html>",
    "helloWorld HTTPServer snake_case",
    "😀 🏳️‍🌈 👩‍👩‍👧‍👦 🇩🇪",
    "你好，世界。これは日本語です 한국어",
    "مرحبا بالعالم ١٢٣",
    "e\u0301 u\u0308 \u0915\u094d\u0937",
    "\u00a0\u2003 \u200b\ufeff",
    "\0\x01\x1f\x7f",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "<|im_start|> <|im_end |><|im_",
    "a" * 3000,
    "supercalifragilisticexpialidocious" * 20,
]


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_assets(read_gguf(path))["tokenizer.json"].decode())


def tiny(path: Path, **metadata: Any) -> Tokenizer:
    """The tokenizer of a tiny model with `tokenizer.ggml.NAME` set."""
    renamed = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return tokenizer_of(tiny_gguf(path / "tiny.gguf", layers=1, metadata=renamed))


# --- byte-level -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", AWKWARD)
def test_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(tmp_path: Path, text: str) -> None:
    ours = tiny(tmp_path)
    assert ours.encode(text).ids == tiny_tokenizer(384).encode(text).ids
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


PIECES = [
    ("gpt-2", "a1234  56", ["a", "1234", "·", "·56"]),
    ("smollm", "a1234  56", ["a", "1", "2", "3", "4", "··", "5", "6"]),
    ("qwen2", "a1234  56", ["a", "1", "2", "3", "4", "·", "·", "5", "6"]),
    ("llama-bpe", "a1234  56", ["a", "123", "4", "·", "·", "56"]),
    ("tekken", "a1234  56", ["a", "1", "2", "3", "4", "·", "·", "5", "6"]),
    ("gpt-2", "camelCase it's IT'S", ["camelCase", "·it", "'s", "·IT", "'", "S"]),
    ("llama-bpe", "camelCase it's IT'S", ["camelCase", "·it", "'s", "·IT", "'S"]),
    ("tekken", "camelCase it's IT'S", ["camel", "Case", "·it", "'s", "·IT", "'S"]),
    ("gpt-2", "x\n\ny!!\n", ["x", "¶", "¶", "y", "!!", "¶"]),
    ("smollm", "x\n\n1", ["x", "¶¶", "1"]),
    ("llama-bpe", "x\n\ny!!\n", ["x", "¶¶", "y", "!!¶"]),
    ("qwen2", "x\n\ny!!\n", ["x", "¶¶", "y", "!!¶"]),
    ("tekken", "a/b //\n", ["a", "/b", "·//¶"]),
]


@pytest.mark.parametrize(("name", "text", "pieces"), PIECES)
def test_each_rule_splits_as_published(tmp_path: Path, name: str, text: str, pieces: list[str]) -> None:
    split = tiny(tmp_path, pre=name).pre_tokenizer.pre_tokenize_str(text)
    assert [piece.replace("Ġ", "·").replace("Ċ", "¶") for piece, _ in split] == pieces


@pytest.mark.parametrize("name", RULES)
@given(text=st.text(max_size=40))
@settings(max_examples=25, deadline=None)
def test_splitting_loses_nothing(tmp_path_factory: Any, name: str, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"{name}.gguf"
    if not path.exists():
        tiny_gguf(path, layers=1, metadata={"tokenizer.ggml.pre": name})
    tokenizer = tokenizer_of(path)
    expected = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    assert tiny(tmp_path, pre="qwen2").encode("e\u0301").ids == tiny(tmp_path, pre="qwen2").encode("é").ids
    assert tiny(tmp_path, pre="smollm").encode("e\u0301").ids != tiny(tmp_path, pre="smollm").encode("é").ids


def test_whole_pieces_need_no_merges_where_the_rule_says_so(tmp_path: Path) -> None:
    tokens = tiny_tokenizer(384).get_vocab()
    long = max((token for token in tokens if token.isalpha() and token.isascii()), key=len)
    assert len(long) > 2
    one = read_merges()[:1]
    assert tiny(tmp_path, pre="llama-bpe", merges=one).encode(long, add_special_tokens=False).ids == [tokens[long]]
    assert len(tiny(tmp_path, pre="qwen2", merges=one).encode(long).ids) == len(long)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, []),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
        ({"pre": "llama-bpe", "add_bos_token": None}, [1]),
        ({"pre": "qwen2", "add_bos_token": None}, []),
        ({"add_bos_token": True, "bos_token_id": None}, []),
    ],
)
def test_begin_and_end_tokens(tmp_path: Path, settings: dict[str, Any], ids: list[int]) -> None:
    tokenizer = tiny(tmp_path, **settings)
    assert tokenizer.encode("").ids == ids
    assert tokenizer.encode("", add_special_tokens=False).ids == []


def test_added_tokens_stay_whole_and_only_control_tokens_are_special(tmp_path: Path) -> None:
    kinds = [3 if index < 3 else 1 for index in range(384)]
    tokens = {index: token for token, index in tiny_tokenizer(384).get_vocab().items()}
    names = [tokens[index] for index in range(384)]
    names[383], kinds[383] = "<think>", 4
    merges = [m for m in read_merges() if "".join(m.split(" ")) != tokens[383]]
    tokenizer = tiny(tmp_path, tokens=names, token_type=kinds, merges=merges)
    ids = tokenizer.encode("a<think>b<|im_end|>").ids
    assert ids[1] == 383
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "a<think>b"


def read_merges() -> list[str]:
    return [" ".join(pair) for pair in json.loads(tiny_tokenizer(384).to_str())["model"]["merges"]]


def test_padding_rows_are_no_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_gguf(tmp_path / "tiny.gguf", layers=1, vocabulary=600))
    assert tokenizer.get_vocab_size() == tiny_tokenizer(600).get_vocab_size() < 600
    assert tokenizer.token_to_id("[PAD599]") is None


def test_the_files_around_the_tokenizer(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.eot_token_id": 0})
    assets = tokenizer_assets(read_gguf(path))
    assert assets["chat_template.jinja"].decode() == CHAT_TEMPLATE
    assert json.loads(assets["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
    }
    config = json.loads(assets["tokenizer_config.json"])
    assert {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token")} == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
    }
    bare = tiny_gguf(path, metadata={"tokenizer.chat_template": None, "tokenizer.ggml.padding_token_id": None})
    assets = tokenizer_assets(read_gguf(bare))
    assert "chat_template.jinja" not in assets
    assert "pad_token_id" not in json.loads(assets["generation_config.json"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"pre": "viking"},
            "must be one of gpt-2, default, smollm.*got 'viking'; pass the model's transformers folder",
        ),
        ({"pre": None}, "tokenizer.ggml.pre.*got None"),
        ({"model": "bert"}, "the tokenizer must be gpt2 or llama .*got 'bert'"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["Ġ Ġ", "Ġ zzz"]}, "a merge must join two tokens.*got 'Ġ' and 'zzz'"),
        ({"merges": ["Ġ"]}, "a merge must join two tokens.*got 'Ġ' and ''"),
        ({"merges": ["a b", "Q Q"]}, "a merge must join two tokens to a third"),
        ({"token_type": [1, 1]}, "each token must have a type: got 384 tokens and 2 types"),
        ({"tokens": ["a", "a"], "token_type": None}, "must differ: some occur twice"),
        ({"bos_token_id": 384}, "bos_token_id must be a token of the vocabulary of 384: got 384"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0, 1.0]}, "each token must have a score: got 384 tokens and 2 scores"),
        ({"tokens": [1, 2, 3]}, "tokenizer.ggml.tokens must be a list of strings"),
    ],
)
def test_what_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        tiny(tmp_path, **metadata)
    assert "\n" not in str(caught.value)


# --- SentencePiece ----------------------------------------------------------------------------------------------------

CONTROL = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "he",
    "ll",
    "lo",
    "ello",
    "▁he",
    "hello",
    "▁hello",
    "▁▁",
    "▁w",
    "wo",
    "wow",
    "ow",
]
SCORES = [-1, -2, -3, -4, -5, -6, -0.5, -0.4, -0.45, -0.9, -0.55, -0.8, -0.7, -0.6, -1.5, -1.7, -1.6, -1.65]


def sentencepiece(path: Path, **metadata: Any) -> Tokenizer:
    settings: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": CONTROL + WORDS,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
        "scores": [0.0] * len(CONTROL) + [float(score) for score in SCORES],
        "merges": None,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": None,
        "add_bos_token": None,
    }
    return tiny(path, **{**settings, **metadata})


def greedy(text: str) -> list[int]:
    """SentencePiece's BPE as its paper has it: join the neighbours whose result scores best, the leftmost of equals."""
    ids = {word: len(CONTROL) + index for index, word in enumerate(WORDS)}
    scores = dict(zip(WORDS, SCORES, strict=True))
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not joins:
            break
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@given(text=st.text("helow ", max_size=12) | st.text(max_size=6).filter(lambda text: "<" not in text))
@example("hello  wow")
@example("é😀\n")
@settings(max_examples=150, deadline=None)
def test_merges_are_rebuilt_from_scores(tmp_path_factory: Any, text: str) -> None:
    cached = tmp_path_factory.getbasetemp() / "spm.json"
    if not cached.exists():
        sentencepiece(tmp_path_factory.getbasetemp()).save(str(cached))
    tokenizer = Tokenizer.from_file(str(cached))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == greedy(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_begins_with_bos_and_keeps_control_tokens(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert tokenizer.encode("hello").ids == [1, *greedy("hello")]
    assert tokenizer.encode("hello</s>wow").ids == [1, *greedy("hello"), 2, *greedy("wow")]
    assert tokenizer.encode("<0x41>", add_special_tokens=False).ids == greedy("<0x41>")
    assert sentencepiece(tmp_path, add_bos_token=False).encode("hello").ids == greedy("hello")


def test_the_space_in_front_is_a_choice(tmp_path: Path) -> None:
    without = sentencepiece(tmp_path, add_space_prefix=False)
    ids = without.encode(" hello", add_special_tokens=False).ids
    for prefix in (None, True):
        with_it = sentencepiece(tmp_path, add_space_prefix=prefix)
        assert with_it.encode("hello", add_special_tokens=False).ids == ids
        assert with_it.decode(ids) == "hello"
    assert without.decode(ids) == " hello"


# --- the real thing ---------------------------------------------------------------------------------------------------

# Ids of the published tokenizer: digits stand alone, so what is before them is split as if the text ended there.
GOLDEN = {
    "  123": [256, 33, 34, 35],
    "a\n\n1": [81, 1116, 33],
    "1234567": [33, 34, 35, 36, 37, 38, 39],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}


@pytest.mark.slow
def test_smollm2_has_the_published_ids() -> None:
    tokenizer = Tokenizer.from_str(open_model("smollm2-135m").assets["tokenizer.json"].decode())
    assert {text: tokenizer.encode(text).ids for text in GOLDEN} == GOLDEN


@pytest.mark.slow
@pytest.mark.parametrize("text", AWKWARD)
def test_smollm2_is_what_transformers_reads(smollm2: tuple[Tokenizer, Any, Any], text: str) -> None:
    """transformers 5.23 leaves out the published digits rule when it reads a GGUF; with it, all ids agree."""
    ours, theirs, folder = smollm2
    ids = ours.encode(text).ids
    assert ids == theirs(text).input_ids
    assert ids == folder(text).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Any]:
    """Ours, transformers' from the GGUF with the published split, and transformers' from the files that we write."""
    from transformers import AutoTokenizer

    checkpoint = open_model("smollm2-135m")
    path = Path(checkpoint.tensors.file.path)  # type: ignore[attr-defined]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    folder = tmp_path_factory.mktemp("smollm2")
    for name, content in checkpoint.assets.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    ours = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
    return ours, theirs, AutoTokenizer.from_pretrained(folder)
