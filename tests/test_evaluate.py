"""Evaluation: perplexity and multiple choice against slow loops, hand-made models and, slow, transformers."""

from __future__ import annotations

import gzip
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_reference import tiny_checkpoint
from tiny import tiny_gguf, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from edgekit.errors import ModelError, UserError
from edgekit.evaluate.choices import Item, accuracy, load_items, score
from edgekit.evaluate.perplexity import perplexity
from edgekit.evaluate.scorer import Scorer, open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.model.reference import forward

VOCABULARY = 384
TEXT = (
    "The quick brown fox jumps over the lazy dog while 12 other dogs are sleeping. Wörter mit Umlauten.\n"
    "A small model that runs on the device in your hand needs no network, no account and no permission.\n"
) * 3
DATA = Path(os.environ.get("EDGEKIT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


@dataclass
class Table:
    """A model whose next token depends on the last one only: logits[last]. It notes what it was asked."""

    logits: NDArray[np.float32]
    context: int = 256
    tokens: list[int] = field(default_factory=list)
    asked: list[tuple[list[int], int]] = field(default_factory=list)  # whole sequence, tokens whose logits were kept
    computed: int = 0

    def forward(self, ids: Sequence[int], *, keep: int = 1) -> NDArray[np.float32]:
        assert 1 <= keep <= len(ids)
        self.tokens += ids
        assert len(self.tokens) <= self.context
        self.asked.append((list(self.tokens), keep))
        self.computed += len(ids)
        return self.logits[self.tokens[-keep:]]

    def rewind(self, length: int) -> None:
        del self.tokens[length:]


def random_table(**options: Any) -> Table:
    return Table(np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) * 3, **options)


def uniform_table(**options: Any) -> Table:
    return Table(np.zeros((VOCABULARY, VOCABULARY), np.float32), **options)


def scorer_of(model: Table, *, bos: bool = False) -> Any:
    tokenizer = tiny_tokenizer(VOCABULARY)
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return Scorer("test", model, tokenizer)


def log_p(logits: Any, token: int) -> float:
    """log softmax(logits)[token], one number at a time in double precision."""
    values = [float(value) for value in logits]
    peak = max(values)
    return values[token] - peak - math.log(math.fsum(math.exp(value - peak) for value in values))


def slow_log_likelihood(whole: list[int], start: int) -> float:
    """log p(whole[start:] | whole[:start]) of the tiny checkpoint, from the NumPy forward over all of it at once."""
    logits = forward(tiny_checkpoint(), [whole[:-1]])[0]
    return math.fsum(log_p(logits[at - 1], whole[at]) for at in range(start, len(whole)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """A real bundle of the tiny checkpoint, in float32."""
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    with open_scorer(str(path)) as scorer:
        yield scorer


# --- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "most"), [(16, None), (15, None), (33, 2), (4, 5), (200, 1)])
def test_perplexity_is_that_of_a_slow_loop(tiny: Scorer, window: int, most: int | None) -> None:
    ids = tiny.tokenizer.encode(TEXT).ids
    losses = []
    for begin in range(0, len(ids) - window + 1, window)[:most]:
        tokens = ids[begin : begin + window]
        logits = forward(tiny_checkpoint(), [tokens])[0]
        losses += [-log_p(logits[at - 1], tokens[at]) for at in range(window // 2 + 1, window)]
    found = perplexity(tiny, TEXT, window=window, max_windows=most)
    assert found.tokens == len(losses)
    assert found.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize(("window", "stride", "most"), [(16, 4, None), (15, 14, None), (33, 7, 3), (16, 1, 5)])
def test_perplexity_with_a_stride_scores_each_token_once(window: int, stride: int, most: int | None) -> None:
    scorer = scorer_of(random_table())
    ids = scorer.tokenizer.encode(TEXT).ids
    begins = list(range(0, len(ids) - window + 1, stride))[:most]
    end = begins[-1] + window
    losses = [-log_p(scorer.model.logits[ids[at - 1]], ids[at]) for at in range(1, end)]
    found = perplexity(scorer, TEXT, window=window, stride=stride, max_windows=most)
    assert (found.tokens, found.windows) == (end - 1, len(begins))
    assert found.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert [tokens for tokens, _ in scorer.model.asked] == [ids[at : at + window - 1] for at in begins]


@pytest.mark.parametrize(("window", "scored"), [(8, 3), (7, 3), (4, 1)])
def test_each_window_is_read_from_an_empty_cache_and_its_second_half_is_scored(window: int, scored: int) -> None:
    scorer = scorer_of(random_table())
    ids = scorer.tokenizer.encode(TEXT).ids
    done: list[tuple[int, int]] = []
    found = perplexity(scorer, TEXT, window=window, max_windows=3, on_window=lambda *state: done.append(state))
    expected = [(ids[begin : begin + window - 1], scored) for begin in (0, window, 2 * window)]
    assert scorer.model.asked == expected
    assert (found.windows, found.tokens) == (3, 3 * scored)
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_what_fills_no_window_is_left_out() -> None:
    scorer = scorer_of(random_table())
    count = len(scorer.tokenizer.encode(TEXT).ids)
    for window in (8, 11, 100):
        assert perplexity(scorer, TEXT, window=window).windows == count // window
        assert perplexity(scorer, TEXT, window=window, max_windows=10**6).windows == count // window


def test_a_beginning_token_replaces_each_window_s_first_one_where_the_tokenizer_adds_it() -> None:
    plain, marked = scorer_of(random_table()), scorer_of(random_table(), bos=True)
    perplexity(plain, TEXT, window=8)
    perplexity(marked, TEXT, window=8)
    for (without, _), (with_it, _) in zip(plain.model.asked, marked.model.asked, strict=True):
        assert with_it == [1, *without[1:]]
        assert without[0] != 1


def test_a_uniform_model_has_the_vocabulary_as_perplexity_and_no_spread() -> None:
    found = perplexity(scorer_of(uniform_table()), TEXT, window=16)
    assert found.value == pytest.approx(VOCABULARY, rel=1e-12)
    assert found.spread == pytest.approx(0, abs=1e-9)


def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens() -> None:
    scorer = scorer_of(uniform_table())
    text = "0123456789" * 8  # a token a digit, a byte each
    assert perplexity(scorer, text, window=10).bits_per_byte == pytest.approx(math.log2(VOCABULARY), rel=1e-12)
    ids = scorer.tokenizer.encode(TEXT).ids
    size = sum(len(scorer.tokenizer.decode(ids[begin + 9 : begin + 16]).encode()) for begin in range(0, 64, 16))
    found = perplexity(scorer, TEXT, window=16, max_windows=4)
    assert found.bits_per_byte == pytest.approx(found.tokens * math.log2(VOCABULARY) / size, rel=1e-12)
    assert found.tokens < size


def test_the_spread_is_that_of_the_windows_means() -> None:
    scorer = scorer_of(random_table())
    ids = scorer.tokenizer.encode(TEXT).ids
    means = []
    for begin in range(0, 48, 16):
        losses = [-log_p(scorer.model.logits[ids[at - 1]], ids[at]) for at in range(begin + 9, begin + 16)]
        means.append(sum(losses) / 7)
    found = perplexity(scorer, TEXT, window=16, max_windows=3)
    half = 1.96 * float(np.std(means, ddof=1)) / math.sqrt(3)
    assert found.spread == pytest.approx(found.value * half, rel=1e-6)
    assert math.isnan(perplexity(scorer, TEXT, window=16, max_windows=1).spread)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "from 4 to the context of 64 tokens: got 3"),
        ({"window": 65}, "from 4 to the context of 64 tokens: got 65"),
        ({"window": 8, "max_windows": 0}, "--windows must be at least 1: got 0"),
        ({"window": 8, "max_windows": -2}, "--windows must be at least 1: got -2"),
        ({"window": 8, "stride": 0}, "--stride must be from 1 to below the window of 8: got 0"),
        ({"window": 8, "stride": 8}, "--stride must be from 1 to below the window of 8: got 8"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(scorer_of(uniform_table(context=64)), TEXT, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "too short"])
def test_texts_that_are_too_short(text: str) -> None:
    with pytest.raises(UserError, match=r"must fill one window of 64 tokens: it has \d"):
        perplexity(scorer_of(uniform_table()), text, window=64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_damaged_model_has_no_perplexity(value: float) -> None:
    """1e6 for every token but the right one: a finite loss, an infinite perplexity."""
    model = uniform_table()
    model.logits[:, 0] = value
    with pytest.raises(ModelError, match=r"the loss must be finite: it is \S+ nats"):
        perplexity(scorer_of(model), TEXT, window=16)
    if not math.isfinite(value):
        with pytest.raises(ModelError, match=r"a log-likelihood must be finite: it is nan"):
            score(scorer_of(model), "The", " quick")


# --- one choice -------------------------------------------------------------------------------------------------------

PAIRS = [
    ("The quick brown fox", " jumps"),
    ("The quick brown fox ", "jumps"),  # the space goes to the continuation
    ("The quick \n", " brown"),
    ("The qu", "ick brown"),  # tokens merge over the border
    ("12", "345"),
    ("Question: Wörter?\nAnswer:", " 你好"),
    ("T", " h" * 40),
]


@pytest.mark.parametrize(("context", "continuation"), PAIRS)
def test_a_score_is_that_of_a_slow_loop(tiny: Scorer, context: str, continuation: str) -> None:
    whole = tiny.tokenizer.encode(context + continuation).ids
    start = len(tiny.tokenizer.encode(context.rstrip()).ids)
    likelihood, _ = score(tiny, context, continuation)
    assert likelihood == pytest.approx(slow_log_likelihood(whole, start), abs=1e-4)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("context", "continuation", "before", "scored"),
    [
        ("The quick", " brown fox", "The quick", " brown fox"),
        ("The quick ", "brown fox", "The quick", " brown fox"),
        ("The quick\n\n", "brown", "The quick", "\n\nbrown"),
        (" The", " quick", " The", " quick"),
        ("The\u00a0", "quick", "The", "\u00a0quick"),  # Python's idea of a space, as in the harness
    ],
)
def test_what_is_context_and_what_is_scored(
    context: str, continuation: str, before: str, scored: str, bos: bool
) -> None:
    scorer = scorer_of(random_table(), bos=bos)
    score(scorer, context, continuation)
    ((sequence, keep),) = scorer.model.asked
    ids = scorer.tokenizer.encode(before + scored).ids
    assert sequence == ids[:-1]
    assert keep == len(ids) - len(scorer.tokenizer.encode(before).ids)
    assert (sequence[0] == 1) is bos


def test_a_score_by_hand_and_whether_it_is_what_greedy_decoding_writes() -> None:
    scorer = scorer_of(random_table())
    table = scorer.model.logits
    first, second, third = scorer.tokenizer.encode("1234").ids[1:]
    expected = log_p(table[scorer.tokenizer.encode("1").ids[0]], first) + log_p(table[first], second)
    likelihood, greedy = score(scorer, "1", "23")
    assert likelihood == pytest.approx(expected, rel=1e-6)
    assert not greedy
    table[scorer.tokenizer.encode("1").ids[0], first] = table[first, second] = 99.0
    likelihood, greedy = score(scorer, "1", "23")
    assert greedy
    assert likelihood == pytest.approx(0, abs=1e-6)
    assert not score(scorer, "1", "234")[1], f"{third} is not the most likely"


def test_a_tokenizer_that_begins_texts_needs_no_context() -> None:
    score(scorer_of(random_table(), bos=True), "", "12")
    for context in ("", " ", "\n"):
        with pytest.raises(UserError, match=r"an item needs a context and a continuation: got '.*' and '.*12'"):
            score(scorer_of(random_table()), context, "12")
    with pytest.raises(UserError, match="needs a context and a continuation"):
        score(scorer_of(random_table()), "The quick", "")


@pytest.mark.parametrize("extra", [0, 1, 2, 50])
def test_what_is_too_long_loses_its_beginning(extra: int) -> None:
    scorer = scorer_of(random_table(context=16))
    likelihood, _ = score(scorer, "9" * (12 + extra) + "01", "234")
    ((sequence, keep),) = scorer.model.asked
    assert (len(sequence), keep) == (16, 3)
    assert likelihood == pytest.approx(score(scorer_of(random_table()), "01", "234")[0], rel=1e-6)


def test_a_continuation_may_fill_the_context_but_no_more() -> None:
    scorer = scorer_of(random_table(context=16))
    score(scorer, "1", "2" * 16)
    assert scorer.model.asked[-1][1] == 16
    with pytest.raises(UserError, match=r"fit in the context of 16 tokens: '2+'... has 17"):
        score(scorer, "1", "2" * 17)


def test_a_shared_beginning_is_read_once_and_changes_nothing(tiny: Scorer) -> None:
    """Whatever was scored before, in whatever order."""
    order = [*PAIRS, *reversed(PAIRS), *PAIRS[::2]]
    for context, continuation in order:
        tiny.model.rewind(0)
        fresh = score(tiny, context, continuation)
        score(tiny, *PAIRS[0])
        again = score(tiny, context, continuation)
        assert again[0] == pytest.approx(fresh[0], abs=1e-4)
        assert again[1] is fresh[1]
    scorer = scorer_of(random_table())
    score(scorer, "The quick brown fox", " jumps")
    read = scorer.model.computed
    score(scorer, "The quick brown fox", " sleeping")
    keep = scorer.model.asked[-1][1]
    assert scorer.model.computed - read == keep


# --- many choices -----------------------------------------------------------------------------------------------------


def digits(context: str, *choices: str, answer: int = 0) -> Item:
    return Item(context, choices, answer)


def test_the_most_likely_choice_wins_as_a_sum_and_by_bytes() -> None:
    """log p of a space, then of each digit: a long choice has a lower sum but may have more a byte."""
    scorer = scorer_of(uniform_table())
    table = scorer.model.logits
    space, one, two = (scorer.tokenizer.encode(text).ids[0] for text in (" ", "1", "2"))
    assert scorer.tokenizer.encode("1 2").ids == [one, space, two]
    table[space, two] = 6.0  # " 2" is likely, and so is each further 2
    table[two, two] = 8.0
    table[space, one] = 6.5  # " 1" is a little more likely
    item = digits("1", "1", "2222", answer=1)
    sums = [score(scorer, *pair)[0] for pair in item.pairs]
    assert sums[0] > sums[1]
    assert sums[0] / 1 < sums[1] / 4
    found = accuracy(scorer, [item])
    assert (found.accuracy, found.accuracy_norm, found.n) == (0, 100, 1)
    wrong = digits("1", "1", "2222", answer=0)
    found = accuracy(scorer, [item, wrong, wrong, wrong])
    assert (found.accuracy, found.accuracy_norm, found.n) == (75, 25, 4)


def test_of_equal_choices_the_first_is_taken() -> None:
    scorer = scorer_of(uniform_table())
    items = [digits("1", "2", "3", "4", answer=answer) for answer in (0, 1, 2)]
    assert [accuracy(scorer, [item]).accuracy for item in items] == [100, 0, 0]
    item = digits(
        "1", "3", "22", answer=1
    )  # 2 tokens and 1 byte, 3 tokens and 2 bytes; the space counts in the sum only
    assert (accuracy(scorer, [item]).accuracy, accuracy(scorer, [item]).accuracy_norm) == (0, 100)


def test_a_single_choice_is_right_when_greedy_decoding_writes_it() -> None:
    scorer = scorer_of(uniform_table())
    space, one, two = (scorer.tokenizer.encode(text).ids[0] for text in (" ", "1", "2"))
    item = digits("1", "2")
    assert accuracy(scorer, [item]).accuracy == 0, "though there is nothing else to choose"
    scorer.model.logits[one, space] = scorer.model.logits[space, two] = 1.0
    found = accuracy(scorer, [item])
    assert (found.accuracy, found.accuracy_norm) == (100, 100)


def test_partial_evaluation_compares_contexts(tiny: Scorer) -> None:
    contexts = ("The dog sat on the fox, for the fox", "The dog sat on the fox, for the dog")
    item = Item("The dog sat on the fox, for _", ("the fox", "the dog in the sun"), 0, contexts, "was warm")
    assert item.pairs == [(context, " was warm") for context in contexts]
    sums = [
        slow_log_likelihood(tiny.tokenizer.encode(c + " was warm").ids, len(tiny.tokenizer.encode(c).ids))
        for c in contexts
    ]
    best = int(np.argmax(sums))
    found = accuracy(tiny, [item])
    assert found.accuracy == found.accuracy_norm == (100 if best == item.answer else 0)


def test_accuracy_tells_how_far_it_is() -> None:
    done: list[tuple[int, int]] = []
    accuracy(scorer_of(uniform_table()), [digits("1", "2", "3")] * 3, on_item=lambda *state: done.append(state))
    assert done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_the_spread_is_half_of_wilson_s_interval(right: int, n: int, low: float, high: float) -> None:
    """Against tabled intervals."""
    scorer = scorer_of(uniform_table())
    items = [digits("1", "2", "3", answer=0)] * right + [digits("1", "2", "3", answer=1)] * (n - right)
    assert accuracy(scorer, items).spread == pytest.approx(100 * (high - low) / 2, abs=0.01)


# --- files ------------------------------------------------------------------------------------------------------------


def write_items(path: Path, count: int) -> list[Item]:
    rows = [
        {"context": f"{i}\u2028", "choices": ["a", "ü"], "answer": i % 2, "task": "x", "id": i} for i in range(count)
    ]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return [Item(f"{i}\u2028", ("a", "ü"), i % 2) for i in range(count)]


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
@pytest.mark.parametrize("limit", [None, 1, 3, 99])
def test_items_are_read_in_order_up_to_a_limit(tmp_path: Path, name: str, limit: int | None) -> None:
    items = write_items(tmp_path / name, 5)
    assert load_items(tmp_path / name, limit=limit) == items[:limit]


def test_blank_lines_and_what_lies_behind_the_limit_do_not_matter(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 2)
    lines = (tmp_path / "items.jsonl").read_text().split("\n")
    (tmp_path / "items.jsonl").write_text(f"\n{lines[0]}\r\n  \n{lines[1]}\nnonsense\n")
    assert load_items(tmp_path / "items.jsonl", limit=2) == items
    with pytest.raises(UserError, match=r"items.jsonl:5 must be a JSON object"):
        load_items(tmp_path / "items.jsonl", limit=3)


def test_texts_are_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    for name in ("a.txt", "a.txt.gz"):
        data = "grüße\r\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert read_text(tmp_path / name) == "grüße\r\n"


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_source_is_run_through_a_graph_that_vanishes(tiny: Scorer, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    before = set(Path(tempfile.gettempdir()).glob("edgekit-*"))
    stages: list[str] = []
    with open_scorer(str(tmp_path / "tiny.gguf"), context=64, threads=1, on_progress=stages.append) as scorer:
        assert (scorer.name, scorer.model.context) == ("tiny.gguf", 64)
        found = perplexity(scorer, TEXT, window=16)
    assert found.value == pytest.approx(perplexity(tiny, TEXT, window=16).value, rel=1e-5)
    assert stages
    assert set(Path(tempfile.gettempdir()).glob("edgekit-*")) <= before


def transformers_scores(scorer: Scorer, path: Path, items: list[Item]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    scores = []
    for item in items:
        start = len(scorer.tokenizer.encode(item.context).ids)
        for choice in item.choices:
            ids = scorer.tokenizer.encode(f"{item.context} {choice}").ids
            with torch.no_grad():
                rows = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
            scores.append(float(rows[range(len(ids) - start), ids[start:]].sum()))
    return scores


@pytest.mark.slow
def test_arc_easy_is_what_transformers_computes() -> None:
    from edgekit.model.builtin import fetch_builtin

    path = DATA / "eval" / "arc_easy.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path}; set EDGEKIT_DATA")
    items = load_items(path, limit=50)
    with open_scorer("smollm2-135m") as scorer:
        ours = [score(scorer, *pair)[0] for item in items for pair in item.pairs]
        theirs = transformers_scores(scorer, fetch_builtin("smollm2-135m"), items)
        found = accuracy(scorer, items[:10])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    sums = iter(theirs)
    right = [int(np.argmax([next(sums) for _ in item.choices])) == item.answer for item in items]
    assert found.accuracy == pytest.approx(100 * np.mean(right[:10]))
    assert sum(right) > 20, "far above chance"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["winogrande", "lambada_openai"])
def test_the_other_forms_of_questions_run(name: str) -> None:
    path = DATA / "eval" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path}; set EDGEKIT_DATA")
    with open_scorer("smollm2-135m", context=1024) as scorer:
        found = accuracy(scorer, load_items(path, limit=100))
    assert found.n == 100
    assert 20 < found.accuracy < 75
    assert found.accuracy == found.accuracy_norm
