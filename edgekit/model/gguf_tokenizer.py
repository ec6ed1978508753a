"""The tokenizer that a GGUF file carries, as the files that transformers and the `tokenizers` library read.

A GGUF keeps the vocabulary, the merges and the name of the rule that splits text before merging. The rules themselves
are here, as each model's published tokenizer.json states them; where llama.cpp approximates one, that file is right.

    gpt2    byte-level BPE: a rule of `RULES`, then merges over bytes
    llama   SentencePiece BPE: a space becomes U+2581, unknown characters fall back to bytes; the file has scores
            instead of merges, and a pair merges the earlier the higher its result's score; a space is put in
            front of a text and after each special token, as Llama 2's tokenizer and llama.cpp do

Not supported: WordPiece, Unigram, RWKV, and rules outside `RULES`. A GGUF does not say whether an added token strips
the spaces around it; none does here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgekit.errors import ModelError
from edgekit.model.gguf_file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
LONGEST_PIECE = 256  # characters; SentencePiece's own limit is 16, and looking for merges is quadratic in it
ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
TEMPLATE = "tokenizer.chat_template"
END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>")  # they end a turn where a chat template has them

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """How text is split before merging: single digits first where `digits`, then by `pattern`, or GPT-2's where None.

    `whole` takes a piece that is itself a token without merging; `nfc` composes characters first; `bos` puts the begin
    token in front when the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    nfc: bool = False
    bos: bool = False


RULES: dict[str, Rule] = {
    "gpt-2": Rule(),
    "default": Rule(),  # doubtful: some converters write it where they know no rule; transformers reads it so too
    "smollm": Rule(digits=True),
    "starcoder": Rule(digits=True),
    "llama-bpe": Rule(LLAMA3, whole=True, bos=True),
    "llama3": Rule(LLAMA3, whole=True, bos=True),
    "llama-v3": Rule(LLAMA3, whole=True, bos=True),
    "qwen2": Rule(QWEN2, nfc=True),
    "deepseek-r1-qwen": Rule(QWEN2, nfc=True),  # Qwen2's with other special tokens
    "tekken": Rule(TEKKEN, whole=True, bos=True),
}


def tokenizer_assets(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json, and chat_template.jinja where the file has one.

    Raises ModelError: a tokenizer or rule that is not supported, or a vocabulary that contradicts itself.
    """
    vocabulary = _vocabulary(file)
    kind = file.require("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer, bos = _byte_level(file, vocabulary)
    elif kind == "llama":
        tokenizer, bos = _sentencepiece(file, vocabulary), True
    else:
        raise ModelError(
            f"{file.path}: the tokenizer must be gpt2 or llama (byte-level or SentencePiece BPE): got {kind!r:.40}"
        )
    _add_tokens(tokenizer, vocabulary)
    names = {
        role: vocabulary.tokens[index] for role, key in ROLES.items() if (index := token_id(file, key)) is not None
    }
    stated = file.get("tokenizer.ggml.add_bos_token", bool)
    add_bos = "bos_token" in names and (bos if stated is None else stated)
    add_eos = "eos_token" in names and bool(file.get("tokenizer.ggml.add_eos_token", bool))
    _add_frame(tokenizer, names["bos_token"] if add_bos else None, names["eos_token"] if add_eos else None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
    }
    generation = {
        "bos_token_id": token_id(file, ROLES["bos_token"]),
        "eos_token_id": end_token_ids(file),
        "pad_token_id": token_id(file, ROLES["pad_token"]),
    }
    assets = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json({key: value for key, value in generation.items() if value is not None}),
    }
    template = file.get(TEMPLATE, str)
    if template:
        assets["chat_template.jinja"] = template.encode()
    return assets


def token_id(file: GgufFile, key: str) -> int | None:
    """A token's id from the metadata, None when absent. Raises ModelError when the vocabulary has no such token."""
    index = file.get(key, int)
    size = len(file.require("tokenizer.ggml.tokens", list))
    if index is not None and not 0 <= index < size:
        raise ModelError(f"{file.path}: {key} must be a token of the vocabulary of {size}: got {index}")
    return index


def end_token_ids(file: GgufFile) -> int | list[int] | None:
    """The tokens that end a text or a turn, as config.json writes them: one number, or a list without repeats.

    Besides those that the file names, they are the `END_TOKENS` of its chat template: many files name only one.
    """
    tokens, template = file.require("tokenizer.ggml.tokens", list), file.get(TEMPLATE, str) or ""
    found = [index for key in END_KEYS if (index := token_id(file, key)) is not None]
    found += [tokens.index(token) for token in END_TOKENS if token in template and token in tokens]
    unique = list(dict.fromkeys(found))
    return unique if len(unique) > 1 else unique[0] if unique else None


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens and their kinds by id; `ids` are those that the model itself may produce or that are added to it."""

    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]


def _vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.require("tokenizer.ggml.tokens", list)
    kinds = file.get("tokenizer.ggml.token_type", np.ndarray)
    listed = [NORMAL] * len(tokens) if kinds is None else kinds.tolist()
    if not tokens or len(listed) != len(tokens):
        raise ModelError(f"{file.path}: each token must have a type: got {len(tokens)} tokens and {len(listed)} types")
    ids = {token: index for index, token in enumerate(tokens) if listed[index] != UNUSED}
    if len(ids) != sum(kind != UNUSED for kind in listed):
        raise ModelError(
            f"{file.path}: the tokens of a vocabulary must differ: some occur twice; convert the model again"
        )
    return _Vocabulary(tokens, listed, ids)


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Make control tokens special and keep them and user-defined ones whole wherever they stand in a text."""
    kinds = {token: vocabulary.kinds[index] for token, index in vocabulary.ids.items()}
    special = [token for token, kind in kinds.items() if kind in (CONTROL, UNKNOWN)]
    whole = [token for token, kind in kinds.items() if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in whole])


def _add_frame(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put the begin and end tokens around a text that is encoded with special tokens."""
    frame = [token for token in (bos, eos) if token is not None]
    if not frame:
        return
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    second = [*([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *second],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in frame],
    )


# --- the two kinds of tokenizer ---------------------------------------------------------------------------------------


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre", str)
    rule = RULES.get(name or "")
    if rule is None:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.pre, the rule that splits text, must be one of {', '.join(RULES)}:"
            f" got {name!r:.40}; pass the model's transformers folder"
        )
    merges = [_pair(merge) for merge in file.require("tokenizer.ggml.merges", list)]
    model = _model(file, vocabulary, merges, ignore_merges=rule.whole)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC() if rule.nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.bos


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    scores = file.require("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(vocabulary.tokens):
        raise ModelError(
            f"{file.path}: each token must have a score: got {len(vocabulary.tokens)} tokens and {len(scores)} scores"
        )
    unknown = token_id(file, ROLES["unk_token"])
    model = _model(
        file,
        vocabulary,
        _merges_by_score(vocabulary, scores.tolist()),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=vocabulary.tokens[unknown if unknown is not None else 0],
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool) is not False
    spaces = [normalizers.Replace(" ", SPACE)]
    words = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    tokenizer.decoder = decoders.Sequence([*words, decoders.Strip(" ", 1, 0)] if prefix else words)
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two normal tokens to a third, the highest score of the result first."""
    normal = {
        token: index
        for token, index in vocabulary.ids.items()
        if vocabulary.kinds[index] == NORMAL and len(token) <= LONGEST_PIECE
    }
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, index in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[index], normal[left], normal[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _pair(merge: str) -> tuple[str, str]:
    """`a b` as two tokens; the first may itself begin with a space."""
    cut = merge.find(" ", 1)
    return (merge[:cut], merge[cut + 1 :]) if cut > 0 else (merge, "")


def _model(
    file: GgufFile,
    vocabulary: _Vocabulary,
    merges: list[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
    unk_token: str | None = None,
) -> models.BPE:
    """A BPE model whose merges were checked: the library panics on what it does not expect."""
    ids = vocabulary.ids
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise ModelError(
                f"{file.path}: a merge must join two tokens to a third of the vocabulary: got {left!r:.40} and"
                f" {right!r:.40}; convert the model again"
            )
    return models.BPE(
        vocab=ids,
        merges=merges,
        ignore_merges=ignore_merges,
        byte_fallback=byte_fallback,
        fuse_unk=fuse_unk,
        unk_token=unk_token,
    )


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1, ensure_ascii=False).encode()
