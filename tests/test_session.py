"""The session: prompts, stopping, seeds, prefix reuse, one answer at a time, and refusals with numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_reference import tiny_checkpoint

from edgekit.bundle import Bundle
from edgekit.checkpoint import Checkpoint
from edgekit.errors import BudgetError, ContextOverflow, ModelError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.manifest import Manifest
from edgekit.model.reference import forward
from edgekit.runtime.sampling import Sampling
from edgekit.runtime.session import Session
from edgekit.runtime.template import Message

PROMPT = "The quick brown fox"
CHAT: list[Message] = [{"role": "user", "content": "Every good test can fail"}]


def bundle_of(checkpoint: Checkpoint, path: Path) -> Path:
    export(checkpoint, path, target=TARGETS["portable"])
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without end tokens, so that a random model goes on for as long as it may."""
    endless = tiny_checkpoint(config={"eos_token_id": None})
    return bundle_of(endless, tmp_path_factory.mktemp("session") / "bundle")


@pytest.fixture
def session(path: Path) -> Session:
    return Session.open(path, threads=1)


def greedy(checkpoint: Checkpoint, ids: list[int], count: int) -> list[int]:
    """What the NumPy forward would say, token by token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(forward(checkpoint, [ids])[0][-1].argmax()))
    return ids[-count:]


def test_greedy_generation_is_the_references(session: Session) -> None:
    answer = session.generate(PROMPT, max_tokens=12)
    text = answer.text()
    assert answer.tokens == greedy(tiny_checkpoint(), session.encode(PROMPT), 12)
    assert text == session.tokenizer.decode(answer.tokens)
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", len(session.encode(PROMPT)))


def test_text_comes_in_pieces_that_make_the_whole(session: Session) -> None:
    pieces = list(session.generate(PROMPT, max_tokens=20))
    assert len(pieces) > 5
    assert "".join(pieces) == session.generate(PROMPT, max_tokens=20).text()


def test_messages_go_through_the_template(session: Session) -> None:
    rendered = "<|im_start|>user\nEvery good test can fail<|im_end|>\n<|im_start|>assistant\n"
    ids = session.encode(CHAT)
    assert session.tokenizer.decode(ids, skip_special_tokens=False) == rendered
    assert ids[0] == 1
    assert session.generate(CHAT, max_tokens=3).prompt_tokens == len(ids)


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens(session: Session, count: int) -> None:
    answer = session.generate(PROMPT, max_tokens=count)
    answer.text()
    assert (len(answer.tokens), answer.finish_reason) == (count, "length")


def test_an_end_token_stops_and_is_not_text(path: Path, session: Session) -> None:
    plain = session.generate(PROMPT, max_tokens=8)
    plain.text()
    end = plain.tokens[3]
    before = plain.tokens[: plain.tokens.index(end)]
    bundle = Bundle.open(path)
    ending = Session(
        replace(bundle, spec=replace(bundle.spec, eos_ids=(end, 2))), session.engine, session.tokenizer, None
    )
    answer = ending.generate(PROMPT, max_tokens=8)
    assert answer.text() == session.tokenizer.decode(before)
    assert answer.finish_reason == "stop"
    assert answer.tokens == [*before, end]


def test_a_stop_string_ends_the_text_before_it(session: Session) -> None:
    whole = session.generate(PROMPT, max_tokens=30).text()
    stop = whole[6:9]
    answer = session.generate(PROMPT, max_tokens=30, stop=["never there", stop])
    assert answer.text() == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < 30


def test_the_beginning_of_a_stop_string_is_given_out_at_the_end(session: Session) -> None:
    whole = session.generate(PROMPT, max_tokens=10).text()
    assert session.generate(PROMPT, max_tokens=10, stop=[whole[-2:] + "never"]).text() == whole


def test_it_ends_where_the_context_ends(path: Path) -> None:
    session = Session.open(path, context=32, threads=1)
    answer = session.generate(PROMPT, max_tokens=1000)
    answer.text()
    assert answer.finish_reason == "context"
    assert len(session.engine.tokens) == 32
    assert answer.prompt_tokens + len(answer.tokens) == 33  # the last one is chosen and no longer read
    wide = Session.open(path, threads=1).generate(PROMPT, max_tokens=len(answer.tokens))
    wide.text()
    assert wide.tokens == answer.tokens


@pytest.mark.parametrize("missing", [0, 1, 20])
def test_prompts_that_leave_no_room(path: Path, missing: int) -> None:
    long = "the " * 40
    ids = Session.open(path, threads=1).encode(long)
    session = Session.open(path, context=len(ids) - missing, threads=1)
    session.generate(PROMPT, max_tokens=2).text()
    before = list(session.engine.tokens)
    with pytest.raises(ContextOverflow, match=rf"{len(ids)} tokens, limit {len(ids) - missing}") as caught:
        session.generate(long)
    assert caught.value.would_need_bytes == session.bundle.spec.cache_bytes(len(ids))
    assert session.engine.tokens == before


def test_a_prompt_that_leaves_room_for_two_tokens(path: Path) -> None:
    session = Session.open(path, threads=1)
    session = Session.open(path, context=len(session.encode(PROMPT)) + 1, threads=1)
    answer = session.generate(PROMPT)
    answer.text()
    assert (len(answer.tokens), answer.finish_reason) == (2, "context")


# --- repeatability and reuse ------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_another_differs(session: Session) -> None:
    def tokens(seed: int) -> list[int]:
        answer = session.generate(PROMPT, max_tokens=20, sampling=Sampling(temperature=1.0, seed=seed))
        answer.text()
        return answer.tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def conversation() -> Iterator[list[Message]]:
    """Turns that grow, one that changes its middle, one that starts anew, and one that goes back."""
    turns: list[Message] = [
        {"role": "user", "content": "Measure the memory"},
        {"role": "assistant", "content": "measure all of them again"},
        {"role": "user", "content": "and the power"},
    ]
    yield turns[:1]
    yield turns
    yield [turns[0], {"role": "assistant", "content": "measure nothing"}, turns[2]]
    yield [{"role": "system", "content": "new"}, *turns]
    yield turns[:1]


def test_what_is_reused_changes_no_token(path: Path) -> None:
    session = Session.open(path, threads=1)
    reused = []
    for messages in conversation():
        answer = session.generate(messages, max_tokens=10)
        answer.text()
        fresh = Session.open(path, threads=1).generate(messages, max_tokens=10)
        fresh.text()
        assert answer.tokens == fresh.tokens
        assert fresh.reused_tokens == 0
        reused.append(answer.reused_tokens)
    first_turn = session.tokenizer.encode("<|im_start|>user\nMeasure the memory<|im_end|>\n").ids
    assert reused[0] == 0
    assert min(reused[1], reused[2]) >= len(first_turn)
    assert reused[3] < 5  # little more than <|im_start|> is the same


def test_the_same_prompt_again_reads_one_token(session: Session) -> None:
    """All of it is in the cache, but the last one must run to give logits."""
    first, second = session.generate(PROMPT, max_tokens=5), session.generate(PROMPT, max_tokens=5)
    assert first.text() == second.text()
    assert second.reused_tokens == second.prompt_tokens - 1


def test_an_answer_that_was_left_does_no_harm(session: Session) -> None:
    whole = session.generate(PROMPT, max_tokens=10)
    whole.text()
    for piece in session.generate(CHAT, max_tokens=50):
        assert piece
        break
    again = session.generate(PROMPT, max_tokens=10)
    again.text()
    assert again.tokens == whole.tokens


def test_one_answer_at_a_time(session: Session) -> None:
    first = session.generate(PROMPT, max_tokens=10)
    next(iter(first))
    second = session.generate(CHAT, max_tokens=10)
    expected = second.text()
    with pytest.raises(UserError, match="one answer at a time"):
        first.text()
    assert session.generate(CHAT, max_tokens=10).text() == expected


def test_an_answer_that_never_began_disturbs_nobody(session: Session) -> None:
    first = session.generate(PROMPT, max_tokens=10)
    pieces = [next(iter(first))]
    session.generate(CHAT)
    pieces += list(first)
    assert "".join(pieces) == session.generate(PROMPT, max_tokens=10).text()


def test_times_are_of_this_answer(session: Session) -> None:
    answer = session.generate(PROMPT, max_tokens=6)
    answer.text()
    timing = answer.timing
    assert len(timing.gaps) == 5
    assert min(timing.tokenize, timing.prefill, timing.sample, *timing.gaps) > 0
    assert timing.first_token == timing.tokenize + timing.prefill + timing.sample


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_empty_prompts(session: Session) -> None:
    with pytest.raises(UserError, match="the prompt must not be empty"):
        session.generate("")
    with pytest.raises(UserError, match="the prompt must not be empty"):
        session.generate([])


def test_prompts_of_no_tokens(path: Path, tmp_path: Path) -> None:
    """A tokenizer may strip what it is given to nothing."""
    data = json.loads((path / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    assets = {**tiny_checkpoint().assets, "tokenizer.json": json.dumps(data).encode()}
    session = Session.open(bundle_of(replace(tiny_checkpoint(), assets=assets), tmp_path / "bundle"), threads=1)
    with pytest.raises(UserError, match="the prompt must give tokens: the tokenizer makes none of '  '"):
        session.generate("  ")


def test_messages_without_a_template(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    assets = {"tokenizer.json": checkpoint.assets["tokenizer.json"]}
    session = Session.open(bundle_of(replace(checkpoint, assets=assets), tmp_path / "bundle"), threads=1)
    with pytest.raises(UserError, match=r"needs a chat template: .*bundle has none"):
        session.generate(CHAT)
    assert session.generate(PROMPT, max_tokens=2).text()


def test_options_out_of_range(path: Path, session: Session) -> None:
    for count in (0, -1):
        with pytest.raises(UserError, match=f"--max-tokens must be at least 1: got {count}"):
            session.generate(PROMPT, max_tokens=count)
    for context in (0, -5, 257):
        with pytest.raises(UserError, match=f"--context must be from 1 to the bundle's 256: got {context}"):
            Session.open(path, context=context)
    with pytest.raises(UserError, match="--threads must be at least 1: got 0"):
        Session.open(path, threads=0)
    with pytest.raises(UserError, match="a stop string must not be empty"):
        session.generate(PROMPT, stop=[""])


def test_too_little_memory_is_refused_before_loading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the graph must not be loaded")

    monkeypatch.setattr("edgekit.runtime.budget.available_bytes", lambda: 40_000_000)
    monkeypatch.setattr("edgekit.runtime.session.Engine", loaded)
    with pytest.raises(BudgetError, match=r"it needs \d+ MB .* 40 MB are available; use a smaller model"):
        Session.open(path)


def test_the_plan_counts_the_context_that_was_asked_for(path: Path) -> None:
    spec = Bundle.open(path).spec
    assert Session.open(path, context=100, threads=1).memory.cache_bytes == spec.cache_bytes(100)
    assert Session.open(path, threads=1).memory.cache_bytes == spec.cache_bytes(256)


# --- chat templates and special tokens of older models ----------------------------------------------------------------

SHORT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def templated(tmp_path: Path, *, config: bytes, file: bytes | None = None) -> Session:
    """A session whose bundle has this tokenizer_config.json, and this chat_template.jinja."""
    checkpoint = tiny_checkpoint()
    assets = {"tokenizer.json": checkpoint.assets["tokenizer.json"], "tokenizer_config.json": config}
    if file is not None:
        assets["chat_template.jinja"] = file
    return Session.open(bundle_of(replace(checkpoint, assets=assets), tmp_path / "bundle"), threads=1)


@pytest.mark.parametrize("bos", ["<|im_start|>", {"content": "<|im_start|>", "special": True}])
@pytest.mark.parametrize(
    "template", [SHORT, [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": SHORT}]]
)
def test_templates_inside_the_tokenizer_config(tmp_path: Path, bos: object, template: object) -> None:
    config = json.dumps({"bos_token": bos, "chat_template": template}).encode()
    session = templated(tmp_path, config=config)
    text = session.tokenizer.decode(session.encode(CHAT), skip_special_tokens=False)
    assert text == "<|im_start|>[user]Every good test can fail"


def test_a_template_file_wins(tmp_path: Path) -> None:
    session = templated(tmp_path, config=json.dumps({"chat_template": SHORT}).encode(), file="模 {{ 1 }}".encode())
    assert session.tokenizer.decode(session.encode(CHAT)) == "模 1"


@pytest.mark.parametrize(
    ("config", "file", "message"),
    [
        (b"{", None, r"tokenizer_config\.json of .* must be JSON"),
        (b"[]", None, r"tokenizer_config\.json of .* must hold a JSON object"),
        (b"\xff", None, r"tokenizer_config\.json of .* must be UTF-8 text"),
        (b"{}", b"\xff\xfe", r"chat_template\.jinja of .* must be UTF-8 text"),
        (b"{}", b"{% for %}", "template"),
    ],
)
def test_broken_templates(tmp_path: Path, config: bytes, file: bytes | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        templated(tmp_path, config=config, file=file)


def test_the_manifest_of_a_session_is_the_bundles(path: Path, session: Session) -> None:
    assert session.bundle.manifest == Manifest.load(path)
