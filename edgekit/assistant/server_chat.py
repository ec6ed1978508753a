"""From a request to the events of its answer: what the model's thread does.

The plain model answers the messages as they are. The documents' model, whose name ends in `:documents`, looks the
question up and answers with sources (`edgekit.assistant.answer`). Both give the same kind of events, to which two are
added here: `Called` for tools and `Progress` for the page; `Ended` closes every answer with what it cost. A content
filter looks at both models' questions and answers.

What a message spells of the model's control tokens stays text (`edgekit.runtime.control`), so that no question can end
its turn and begin another's; in a tool's result, the marks of calls and results are parted besides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgekit.assistant.answer import Assistant, Filtered, Finished, Reply, Text
from edgekit.assistant.answer import Event as AnswerEvent
from edgekit.assistant.api import ApiError, EmbeddingRequest, Request
from edgekit.assistant.filter import Filter, Gate, Verdict
from edgekit.assistant.prompt import Neutral
from edgekit.assistant.queue import Job
from edgekit.assistant.server_metrics import Cost, Meter, Metrics, Reading, speed
from edgekit.assistant.structure import Grammar, Structures
from edgekit.assistant.tools import Call, Splitter, Tool, instructions, read_call, result_message, run_tool
from edgekit.profile.memory import read_memory
from edgekit.runtime.embeddings import Embedder, Embeddings
from edgekit.runtime.session import Generation, Session
from edgekit.runtime.template import Message

DOCUMENTS = ":documents"  # ends the name of the model that answers from them
MAX_ROUNDS = 4  # of built-in tools in one answer
PROGRESS_S = 0.25
MEMORY_S = 2.0


@dataclass(frozen=True)
class Called:
    """The model asked for a tool; `result` is None when the client runs it."""

    call: Call
    result: str | None


@dataclass(frozen=True)
class Progress:
    """How far the answer is, some times a second. `memory_bytes` is the process's PSS, None where unknown."""

    generated_tokens: int
    tokens_per_second: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Ended:
    """The end of an answer. `reason`: stop, length, tool_calls or content_filter, as OpenAI has them."""

    reason: Literal["stop", "length", "tool_calls", "content_filter"]
    reply: Reply
    cost: Cost


Event = AnswerEvent | Called | Progress | Ended


@dataclass
class Model:
    """All that the server answers with. `max_tokens` bounds every answer, whatever a request asks for; the assistant
    has a filter of its own."""

    name: str
    session: Session
    meter: Meter
    metrics: Metrics
    max_tokens: int = 1024
    assistant: Assistant | None = None
    content_filter: Filter | None = None
    embedder: Embedder | None = None
    embedder_name: str = ""
    tools: Sequence[Tool] = ()
    _structures: Structures | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._neutral = Neutral(self.session.tokenizer)

    @property
    def names(self) -> list[str]:
        """The models that a request may name."""
        documents = [self.name + DOCUMENTS] if self.assistant is not None else []
        return [self.name, *documents, *([self.embedder_name] if self.embedder is not None else [])]

    def events(self, request: Request, job: Job[Any]) -> Iterator[Event]:
        """The answer's events, ending with `Ended`. Raises ApiError and what the session raises."""
        documents = request.model == self.name + DOCUMENTS
        assert documents or request.model == self.name
        if request.extras.document is not None and not documents:
            raise ApiError(f"a document is read by {self.name}{DOCUMENTS}: name that model", param="edgekit")
        source = self._documents(request) if documents else self._filtered(request)
        self.session.go_on = job.wanted
        before, reply, called = self.session.current, None, False
        reading = Reading()
        try:
            with self.meter.running(reading):
                for event in self._with_progress(source, job):
                    called = called or (isinstance(event, Called) and event.result is None)
                    if isinstance(event, Finished):
                        reply = event.reply
                    yield event
        finally:
            self.session.go_on = lambda: True
            generation = self.session.current if self.session.current is not before else None
            cost = _cost(reply, generation, reading)
            if reply is None:
                self.metrics.answer("cancelled" if job.cancelled else "error", cost)
        assert reply is not None
        reason = "tool_calls" if called else "length" if job.late else _REASONS[reply.finish_reason]
        self.metrics.answer(reason, cost)
        yield Ended(reason, reply, cost)

    def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Vectors of texts. Raises ApiError."""
        assert self.embedder is not None
        if request.dimensions not in (None, self.embedder.dim):
            raise ApiError(f"dimensions must be {self.embedder.dim}: got {request.dimensions}", param="dimensions")
        return self.embedder.encode(request.texts)

    def _filtered(self, request: Request) -> Iterator[Event]:
        """The plain model's events as far as the filter lets them through."""
        content_filter = self.content_filter
        if content_filter is None:
            yield from self._plain(request)
            return
        verdicts = content_filter.check(_asked(request.prompt), "question")
        yield from map(Filtered, verdicts)
        if any(verdict.action == "block" for verdict in verdicts):
            yield Finished(Reply("", (), "blocked", None, 0, 0, 0, 0.0, None))
            return
        gate, shown = Gate(content_filter), ""
        for event in self._plain(request):
            items: list[str | Verdict] = []
            if isinstance(event, Text):
                items = list(gate.push(event.text))
            elif isinstance(event, Called):
                items = [*content_filter.check(str(dict(event.call.arguments)), "answer")]
            elif isinstance(event, Finished):
                items = list(gate.finish())
            for item in items:
                shown += item if isinstance(item, str) else ""
                yield Text(item) if isinstance(item, str) else Filtered(item)
            if any(isinstance(item, Verdict) and item.action == "block" for item in items):
                generation = self.session.current
                tokens = (generation.prompt_tokens, len(generation.tokens)) if generation is not None else (0, 0)
                timing = generation.timing if generation is not None else None
                yield Finished(Reply(shown, (), "blocked", None, *tokens, 0, 0.0, timing))
                return
            if isinstance(event, Finished):
                yield Finished(replace(event.reply, text=shown))
            elif not isinstance(event, Text):
                yield event

    def _plain(self, request: Request) -> Iterator[Event]:
        """The model's own answer, and the rounds of built-in tools before it."""
        built_in = [self._built_in(name) for name in request.extras.tools]
        tools, choice = [*request.tools, *built_in], request.choice
        begin, prompt_tokens, tokens, shown = time.perf_counter(), 0, 0, ""
        turns: list[Message] = []
        for at in range(MAX_ROUNDS + 1):
            last = at == MAX_ROUNDS
            offered = [] if choice == "none" or last else _offered(tools, choice)
            answer = self._begin(request, turns, offered, forced=choice not in ("auto", "none"), spent=tokens)
            splitter = Splitter()
            for piece in answer:
                text = splitter.push(piece) if offered else piece
                if text:
                    shown += text
                    yield Text(text)
            if rest := splitter.finish():
                shown += rest
                yield Text(rest)
            prompt_tokens += answer.prompt_tokens
            tokens += len(answer.tokens)
            call = read_call(splitter.call) if splitter.call else None
            tool = next((tool for tool in offered if call is not None and tool.name == call.name), None)
            if call is None or tool is None or tool.run is None:
                break
            result = run_tool(tool, call)
            yield Called(call, result)
            turns += [{"role": "assistant", "content": splitter.call}, result_message(self._neutral(result))]
            choice = "auto"
            if tokens >= self._most(request) or not self.session.go_on():
                break
        if call is not None and tool is not None and tool.run is None:
            yield Called(call, None)
        reason = answer.finish_reason or "length"
        seconds = time.perf_counter() - begin
        yield Finished(Reply(shown, (), reason, None, prompt_tokens, tokens, 0, seconds, answer.timing))

    def _begin(
        self, request: Request, turns: Sequence[Message], offered: Sequence[Tool], *, forced: bool, spent: int
    ) -> Generation:
        grammar: Grammar | None = None
        if request.schema is not None:
            grammar = self._grammars().json_schema(request.schema)
        elif offered:
            grammar = self._grammars().tool_calls({tool.name: tool.parameters for tool in offered}, forced=forced)
        if isinstance(request.prompt, str):
            prompt: str | list[Message] = request.prompt
        else:
            messages = [*request.prompt, *turns]
            prompt = _told(messages, instructions(offered, forced=forced)) if offered else messages
        return self.session.generate(
            prompt,
            max_tokens=max(1, self._most(request) - spent),
            sampling=request.sampling,
            stop=request.stop,
            constraint=grammar,
        )

    def _documents(self, request: Request) -> Iterator[Event]:
        """The assistant's answer to the last question."""
        assert self.assistant is not None
        turns = request.prompt
        if isinstance(turns, str) or turns[-1]["role"] != "user":
            raise ApiError("the last message must be the user's question", param="messages")
        for turn in turns:
            if turn["role"] == "system":
                raise ApiError(f"{request.model} has its own system message: leave yours out", param="messages")
        if request.schema is not None or request.tools or request.extras.tools:
            raise ApiError(f"{request.model} has no tools and no response_format: use {self.name}", param="model")
        yield from self.assistant.answer(
            turns[-1]["content"],
            turns[:-1],
            document=request.extras.document,
            max_tokens=self._most(request),
            sampling=request.sampling,
            stop=request.stop,
        )

    def _with_progress(self, events: Iterator[Event], job: Job[Any]) -> Iterator[Event]:
        """`events`, and after text the speed and the memory, but seldom."""
        shown = looked = 0.0
        memory: int | None = None
        for event in events:
            yield event
            now = time.monotonic()
            generation = self.session.current
            if isinstance(event, Text) and now - shown > PROGRESS_S and generation is not None:
                if now - looked > MEMORY_S:
                    memory, looked = read_memory().pss_bytes, now
                shown = now
                yield Progress(len(generation.tokens), speed(generation.timing), memory)

    def _built_in(self, name: str) -> Tool:
        found = next((tool for tool in self.tools if tool.name == name), None)
        if found is None:
            known = ", ".join(tool.name for tool in self.tools) or "none"
            raise ApiError(f"there is no built-in tool {name!r:.50}; there are: {known}", param="edgekit")
        return found

    def _grammars(self) -> Structures:
        if self._structures is None:
            self._structures = Structures.of(self.session)
        return self._structures

    def _most(self, request: Request) -> int:
        return min(request.max_tokens or self.max_tokens, self.max_tokens)


def _cost(reply: Reply | None, generation: Generation | None, reading: Reading) -> Cost:
    """What an answer took; one that was broken off has no reply, and the generation it was at counts alone."""
    timing = reply.timing if reply is not None else generation.timing if generation is not None else None
    return Cost(
        prompt_tokens=reply.prompt_tokens if reply is not None else generation.prompt_tokens if generation else 0,
        reused_tokens=generation.reused_tokens if generation is not None else 0,
        generated_tokens=reply.generated_tokens if reply is not None else len(generation.tokens) if generation else 0,
        seconds=reading.seconds,
        first_token_s=timing.first_token if timing is not None else None,
        tokens_per_second=speed(timing),
        joules=reading.joules,
        joules_reason=reading.reason,
    )


_REASONS: dict[str, Literal["stop", "length", "content_filter"]] = {
    "stop": "stop", "unknown": "stop", "length": "length", "context": "length", "blocked": "content_filter",
}  # fmt: skip


def _asked(prompt: str | Sequence[Message]) -> str:
    """What is new in a prompt: all that came after the model's last turn."""
    if isinstance(prompt, str):
        return prompt
    new = len(prompt) - next(
        (at for at, turn in enumerate(reversed(prompt)) if turn["role"] == "assistant"), len(prompt)
    )
    return "\n".join(turn["content"] for turn in prompt[new:])


def _offered(tools: Sequence[Tool], choice: str) -> list[Tool]:
    return [tool for tool in tools if not choice.startswith("=") or tool.name == choice[1:]]


def _told(messages: Sequence[Message], about_tools: str) -> list[Message]:
    """The messages with what there is to say of tools at the end of the system message."""
    first, rest = (messages[0], messages[1:]) if messages[0]["role"] == "system" else (None, messages)
    text = f"{first['content']}\n\n{about_tools}" if first else about_tools
    return [{"role": "system", "content": text}, *rest]
