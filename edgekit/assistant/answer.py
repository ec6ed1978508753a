"""The assistant: a question becomes an answer with sources.

    assistant = Assistant(session, index)
    for event in assistant.answer("When is the office closed?"):
        if isinstance(event, Text):
            print(event.text, end="")

The events of one answer, in this order: `Filtered` for each rule that the question touches (a block ends the answer
there), `Sources`, `Routed` when a router is on, `Opened` when a whole document is read, then `Text` pieces, `Filtered`
for the answer, and always one `Finished` at the end, whose text is that of all pieces together.

An answer from documents has one of two styles. "quote": the model reads the sentences that were found and chooses the
two that answer best; it writes nothing, so nothing is made up. "write": the model writes, and each sentence is traced
to the sentence of a document that supports it. A model of a few hundred million parameters gets far more right by
quoting (docs/assistant.md has the numbers), so that is the default.

With `document`, nothing is searched: the whole document stands in the context (reading.py), and the model writes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.assistant import draft as drafts
from edgekit.assistant.evidence import Quote, quotes, sentences, stands, traced
from edgekit.assistant.filter import Filter, Gate, Verdict
from edgekit.assistant.index import Index
from edgekit.assistant.prompt import Neutral, Prompt, fitted
from edgekit.assistant.reading import Reader, Reading
from edgekit.assistant.router import Decision, Draft
from edgekit.assistant.search import Found, search
from edgekit.assistant.switch import Switch
from edgekit.errors import UserError
from edgekit.runtime.prefix import Prefixes
from edgekit.runtime.sampling import Sampling
from edgekit.runtime.session import Session, Timing
from edgekit.runtime.template import Message

Style = Literal["quote", "write"]
UNKNOWN = "I don't know: I found nothing about this in the documents."
CANDIDATES = 5  # sentences that the model reads to choose from
QUOTES = 2
ALIKE = 0.6  # a second sentence is quoted when it has this share of the first one's score in evidence.py
LEAST_ROOM = 32  # tokens for an answer


@dataclass(frozen=True)
class Citation:
    """Where a sentence of an answer comes from: `quote` stands in `document` from character `start` to `end`, which
    was checked. `number` is that of the passage in `Sources` (from 1), as the text cites it: [1]."""

    number: int
    document: str
    heading: str
    start: int
    end: int
    quote: str


@dataclass(frozen=True)
class Reply:
    """A finished answer. `finish_reason`: "stop", "length" or "context" as a session says, "unknown" when nothing
    relevant was found, "blocked" when the filter ended it. `dropped_turns` of the history did not fit in the context.
    `timing` is None, and the counts of tokens are 0, where no local model wrote."""

    text: str
    citations: tuple[Citation, ...]
    finish_reason: Literal["stop", "length", "context", "unknown", "blocked"]
    route: Decision | None
    prompt_tokens: int
    generated_tokens: int
    dropped_turns: int
    seconds: float
    timing: Timing | None


@dataclass(frozen=True)
class Sources:
    """The passages that the answer may use; those that did not fit in the context are left out."""

    found: Found


@dataclass(frozen=True)
class Routed:
    decision: Decision


@dataclass(frozen=True)
class Opened:
    """A whole document is in the context now."""

    reading: Reading


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Filtered:
    verdict: Verdict


@dataclass(frozen=True)
class Finished:
    reply: Reply


Event = Sources | Routed | Opened | Text | Filtered | Finished


def to_json(event: Event) -> dict[str, Any]:
    """An event as JSON data: {"type": "text", ...} with the fields of what it holds."""
    (content,) = (getattr(event, field.name) for field in dataclasses.fields(event))
    fields: dict[str, Any] = {"text": content} if isinstance(content, str) else dataclasses.asdict(content)
    if isinstance(event, Sources):
        fields["known"] = event.found.known
    return {"type": type(event).__name__.lower(), **fields}


@dataclass
class _Made:
    """An answer in the making, before it is given out: its text comes from `pieces`, and the rest is final then."""

    pieces: Iterator[str]
    draft: Draft | None = None
    quotes: tuple[Quote, ...] = ()
    finish: Literal["stop", "length", "context", "unknown"] = "stop"
    prompt_tokens: int = 0
    generated_tokens: int = 0
    dropped_turns: int = 0
    timing: Timing | None = None


@dataclass(frozen=True)
class Made:
    """What an answer was made of: what was found, the sentences that seemed to answer, and the draft's own view."""

    found: Found
    evidence: tuple[Quote, ...]
    _answer: _Made

    @property
    def draft(self) -> Draft | None:
        """None where no model has read or written anything, or it was not watched."""
        return self._answer.draft


class Assistant:
    """A session with an index to look things up in. One answer at a time, as the session.

    `index`: None answers from the model alone. `router`, `content_filter`: None switches them off. `style` is that of
    answers from the index. `prefixes` keeps what the model has read of whole documents. With `watch`, `last` is what
    the latest answer from documents was made of, once it ended.
    Raises UserError for a router without an index.
    """

    def __init__(
        self,
        session: Session,
        index: Index | None = None,
        *,
        router: Switch | None = None,
        content_filter: Filter | None = None,
        style: Style = "quote",
        prefixes: Prefixes | None = None,
        watch: bool = False,
    ) -> None:
        if router is not None and index is None:
            raise UserError("a router needs an index, since it was fitted on answers from one: pass --docs")
        self.session = session
        self.index = index
        self._router = router
        self._filter = content_filter
        self.style = style
        self.last: Made | None = None
        self._watch = watch or router is not None
        self._neutral = Neutral(session.tokenizer)
        self._reader = None if index is None else Reader(session, index, prefixes)

    @property
    def endpoint(self) -> str | None:
        """The address that questions may be handed over to; None where all answers are made here."""
        return None if self._router is None else self._router.settings.endpoint.url

    def answer(
        self,
        question: str,
        history: Sequence[Message] = (),
        *,
        document: str | None = None,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        stop: Sequence[str] = (),
    ) -> Iterator[Event]:
        """The events of one answer; closing the iterator ends the generation.

        `history`: the turns before this question, oldest first, "user" and "assistant". `document`: the one of the
        index that the question is about, which is read whole; no router is asked then. `max_tokens`, `sampling` and
        `stop` are for what a model writes. Raises UserError for an empty question or no such document, and what
        `Session.generate` raises.
        """
        begin = time.perf_counter()
        if not question.strip():
            raise UserError("a question must not be empty: write some text")
        verdicts = self._filter.check(question, "question") if self._filter else []
        yield from map(Filtered, verdicts)
        if any(verdict.action == "block" for verdict in verdicts):
            seconds = time.perf_counter() - begin
            yield Finished(Reply("", (), "blocked", None, 0, 0, 0, seconds, None))
            return
        if document is not None:
            yield from self._from_whole(begin, question, history, document, max_tokens, sampling, stop)
            return
        found = self._found(question, history)
        if found is None:
            made = self._written(question, history, (), max_tokens, sampling, stop)
            yield from self._told(begin, made, None, ())
            return
        yield from self._from_documents(begin, question, history, found, max_tokens, sampling, stop)

    def _found(self, question: str, history: Sequence[Message]) -> Found | None:
        """What the index has: for the question, or else for it and the one before, which it may be about."""
        if self.index is None:
            return None
        found = search(self.index, question)
        before = [turn["content"] for turn in history if turn["role"] == "user"]
        if not found.known and before:
            together = search(self.index, f"{before[-1]} {question}")
            return together if together.known else found
        return found

    def _from_documents(
        self,
        begin: float,
        question: str,
        history: Sequence[Message],
        found: Found,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> Iterator[Event]:
        assert self.index is not None
        router = self._router
        evidence = quotes(self.index, question, found, limit=CANDIDATES) if found.known else []
        decision: Decision | None = None
        away = ""
        if router is not None:
            private = router.private(question, found)
            decision = Decision("here", "before", f"it stays here: {private}") if private else None
            if decision is None:
                decision = router.decide(question, found, evidence, None)
                if decision.to == "elsewhere":
                    away, decision = router.ask(question, found, decision)
        undecided = router is not None and decision is not None and decision.to == "here" and decision.wrong is not None
        made: _Made
        if away:
            made = _Made(iter([away]))
        elif not found.known:
            made = _Made(iter([UNKNOWN]), finish="unknown", draft=Draft(0.0, 0.0, 0))
        elif self.style == "quote":
            made = self._quoted(question, evidence)
        else:
            made = self._written(question, history, found.passages, max_tokens, sampling, stop)
        if undecided and not away:
            text = "".join(made.pieces)  # nothing of a draft is shown before it is decided who answers
            made.pieces = iter([text])
            if made.draft is not None and router is not None and decision is not None:
                later = router.decide(question, found, evidence, made.draft)
                if later.to == "elsewhere":
                    away, later = router.ask(question, found, later)
                    made = _Made(iter([away])) if away else made
                decision = later
        yield Sources(found)
        if decision is not None:
            yield Routed(decision)
        everything = () if made.quotes or made.finish == "unknown" else self._sentences(found)
        self.last = Made(found, tuple(evidence), made)
        yield from self._told(begin, made, decision, everything)

    def _from_whole(
        self,
        begin: float,
        question: str,
        history: Sequence[Message],
        document: str,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> Iterator[Event]:
        if self._reader is None:
            raise UserError("a document needs an index that it stands in: pass --docs")
        found = self._reader.found(document)
        room = self.session.engine.context - min(max_tokens, LEAST_ROOM)
        prompt = self._reader.prompt(document, question, history, room=room)
        yield Sources(found)
        yield Opened(self._reader.read(document))
        made = self._generated(prompt, max_tokens, sampling, stop)
        yield from self._told(begin, made, None, self._sentences(found))

    def _told(
        self, begin: float, made: _Made, decision: Decision | None, everything: Sequence[Quote]
    ) -> Iterator[Event]:
        """Give the answer out, as far as the filter lets it; then its citations."""
        gate = Gate(self._filter)
        shown, blocked = [], False

        def checked() -> Iterator[str | Verdict]:
            for piece in made.pieces:
                yield from gate.push(piece)
            yield from gate.finish()

        for item in checked():
            if isinstance(item, Verdict):
                yield Filtered(item)
                if item.action == "block":
                    blocked = True
                    break
            else:
                shown.append(item)
                yield Text(item)
        text = "".join(shown)
        used = () if blocked else made.quotes or tuple(traced(text, everything))
        yield Finished(
            Reply(
                text=text,
                citations=tuple(Citation(q.number, q.document, q.heading, q.start, q.end, q.text) for q in used),
                finish_reason="blocked" if blocked else made.finish,
                route=decision,
                prompt_tokens=made.prompt_tokens,
                generated_tokens=made.generated_tokens,
                dropped_turns=made.dropped_turns,
                seconds=time.perf_counter() - begin,
                timing=made.timing,
            )
        )

    def _quoted(self, question: str, evidence: Sequence[Quote]) -> _Made:
        """The sentences that the model takes for the answer, each with the number of its passage."""
        ranked, draft = drafts.reordered(self.session, question, evidence)
        scores = {(quote.document, quote.start): quote.score for quote in evidence}
        least = ALIKE * scores[ranked[0].document, ranked[0].start] if ranked else 0.0
        chosen = tuple(quote for quote in ranked[:QUOTES] if scores[quote.document, quote.start] >= least)
        lines = (f"{' '.join(quote.text.split())} [{quote.number}]" for quote in chosen)
        made = _Made(iter([]), draft=draft, quotes=chosen)
        made.pieces = (line if at == 0 else f"\n{line}" for at, line in enumerate(lines))
        return made

    def _written(
        self,
        question: str,
        history: Sequence[Message],
        passages: Sequence[Any],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> _Made:
        """What the model writes, as it comes."""
        session = self.session
        prompt = fitted(
            question,
            passages,
            history,
            neutral=self._neutral,
            count=lambda messages: len(session.encode(messages)),
            room=session.engine.context - min(max_tokens, LEAST_ROOM),
            grounded=bool(passages),
        )
        return self._generated(prompt, max_tokens, sampling, stop)

    def _generated(self, prompt: Prompt, max_tokens: int, sampling: Sampling, stop: Sequence[str]) -> _Made:
        session = self.session
        generation = session.generate(prompt.messages, max_tokens=max_tokens, sampling=sampling, stop=stop)
        made = _Made(iter([]), dropped_turns=prompt.dropped_turns)

        def pieces() -> Iterator[str]:
            yield from generation
            made.finish = generation.finish_reason or "length"
            made.prompt_tokens = generation.prompt_tokens
            made.generated_tokens = len(generation.tokens)
            made.timing = generation.timing
            if self._watch:
                made.draft = drafts.of_generation(session, generation)

        made.pieces = pieces()
        return made

    def _sentences(self, found: Found) -> list[Quote]:
        """All sentences of the sources that the index has where it should."""
        assert self.index is not None
        index = self.index
        every = (
            Quote(at, p.document, p.title, p.heading, p.start + a, p.start + b, p.text[a:b], 0.0)
            for at, p in enumerate(found.passages, 1)
            for a, b in sentences(p.text)
        )
        return [quote for quote in every if stands(index, quote)]
