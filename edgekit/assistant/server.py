"""The server: the OpenAI interface and the page over one model.

    app = make_app(Model(...), Line(waiting=32), records=None, settings=Settings())
    serve(app, host="127.0.0.1", port=8080, started=print)     # server_listen.py

One request at a time runs, in the line's thread; the others wait their turn or are told when to come back. Whoever goes
away while waiting or reading ends the request: it is not begun, or stops at the next token. The status is sent with the
first event of an answer, so that a prompt that is too long gets 400 and not a broken stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgekit.assistant import api, api_format, page
from edgekit.assistant.api import ApiError
from edgekit.assistant.queue import Full, Job, Line
from edgekit.assistant.records import Entry, Records
from edgekit.assistant.server_chat import Event, Model
from edgekit.assistant.server_guard import Guard, Intake, respond
from edgekit.errors import ContextOverflow, EdgekitError, UserError
from edgekit.profile.memory import read_memory

T = TypeVar("T")

SEND_S = 60.0  # how long a reader may leave a piece of an answer unread


@dataclass(frozen=True)
class Settings:
    """`seconds` is the most that one answer may take; `hosts` and `any_address` as `Guard` has them."""

    token: str | None = None
    hosts: tuple[str, ...] = ()
    any_address: bool = False
    seconds: float = 300.0


class App:
    """The routes and what they answer with. `model` may be set to another of the same name at any time: an answer that
    is being made keeps the one that it began with."""

    def __init__(self, model: Model, line: Line, records: Records | None, settings: Settings) -> None:
        self.model = model
        self.line = line
        self.records = records
        self.settings = settings
        self.created = int(time.time())
        self._intake = Intake()

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/api/status", self.status),
            Route("/api/conversations", self.conversations, methods=["GET", "DELETE"]),
            Route("/api/conversations/{id}", self.conversation, methods=["GET", "DELETE"]),
            Route("/api/export", self.export),
        ]

    # --- the OpenAI interface

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse(api_format.models(self.model.names, self.created))

    async def one_model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        self._known(name, self.model.names)
        return JSONResponse(api_format.model(name, self.created))

    async def chat(self, request: HttpRequest) -> ASGIApp:
        asked = api.read_chat(await self._json(request))
        self._known(asked.model, [name for name in self.model.names if name != self.model.embedder_name])
        return await self._answer(request, asked, "chat")

    async def completion(self, request: HttpRequest) -> ASGIApp:
        asked = api.read_completion(await self._json(request))
        self._known(asked.model, [self.model.name])
        return await self._answer(request, asked, "completion")

    async def embeddings(self, request: HttpRequest) -> Response:
        asked = api.read_embedding(await self._json(request))
        if self.model.embedder is None:
            raise ApiError("the server has no encoder: start it with --embedder", status=404, code="model_not_found")
        self._known(asked.model, [self.model.embedder_name])
        job = self.line.submit(lambda job: iter([self.model.embed(asked)]), seconds=self.settings.seconds)
        found = await _unless_gone(request, _collected(job))
        return JSONResponse(api_format.embedding(asked, found[0])) if found else Response(status_code=499)

    async def _answer(self, request: HttpRequest, asked: api.Request, kind: api_format.Kind) -> ASGIApp:
        writer = api_format.Writer(asked, kind)
        job = self.line.submit(lambda job: self._recorded(asked, job), seconds=self.settings.seconds)
        if asked.stream:
            events = aiter(job)
            try:
                first = await _unless_gone(request, _first(events))
            except BaseException:
                job.cancel()
                raise
            if first is None:
                job.cancel()
                return Response(status_code=499)
            return _Stream(job, events, first, writer)
        found = await _unless_gone(request, _collected(job))
        if found is None:
            return Response(status_code=499)
        for event in found:
            writer.add(event)
        return JSONResponse(writer.whole())

    def _recorded(self, asked: api.Request, job: Job[Event]) -> Iterator[Event]:
        """The answer's events; the question and the answer go to the records, also one that was stopped."""
        conversation = asked.extras.conversation
        if self.records is None or conversation is None or isinstance(asked.prompt, str):
            yield from self.model.events(asked, job)
            return
        writer = api_format.Writer(asked, "chat")
        begun = False
        try:
            for event in self.model.events(asked, job):
                if not begun:  # what is refused, and asked again, is written once
                    self.records.add(conversation, Entry("user", asked.prompt[-1]["content"]))
                    begun = True
                writer.add(event)
                yield event
        finally:
            if writer.text or writer.reason:
                facts = {**writer.notes, "stopped": writer.reason is None}
                self.records.add(conversation, Entry("assistant", writer.text, facts))

    async def _json(self, request: HttpRequest) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await self._intake.read(request.receive, request.headers)
        if kind != "application/json":
            raise ApiError(f"Content-Type must be application/json: got {kind!r:.60}", status=415)
        return api.read_json(body)

    def _known(self, name: str, names: list[str]) -> None:
        if name not in names:
            known = ", ".join(names)
            raise ApiError(f"there is no model {name!r:.80} here; there is: {known}", status=404, param="model",
                           code="model_not_found")  # fmt: skip

    # --- the page

    async def page(self, request: HttpRequest) -> Response:
        return _file(request, "page.html")

    async def static(self, request: HttpRequest) -> Response:
        return _file(request, request.path_params["name"])

    async def status(self, request: HttpRequest) -> Response:
        model, session = self.model, self.model.session
        return JSONResponse(
            {
                "model": model.name,
                "models": model.names,
                "release": session.bundle.path.name,
                "documents": model.assistant is not None,
                "handover": model.assistant.endpoint if model.assistant is not None else None,
                "context": session.engine.context,
                "max_tokens": model.max_tokens,
                "chat": session.template is not None,
                "tools": [{"name": tool.name, "description": tool.description} for tool in model.tools],
                "records": self.records is not None,
                "keep_days": self.records.keep_days if self.records is not None else None,
                "power": model.meter.source.name if model.meter.source is not None else None,
                "power_reason": model.meter.reason,
                "memory_bytes": (await asyncio.to_thread(read_memory)).pss_bytes,
                "waiting": self.line.waiting,
                "busy": self.line.busy,
            }
        )

    async def conversations(self, request: HttpRequest) -> Response:
        records = self._records()
        if request.method == "DELETE":
            return JSONResponse({"deleted": await asyncio.to_thread(records.delete)})
        return JSONResponse({"conversations": [vars(row) for row in await asyncio.to_thread(records.conversations)]})

    async def conversation(self, request: HttpRequest) -> Response:
        records, name = self._records(), request.path_params["id"]
        if request.method == "DELETE":
            gone = await asyncio.to_thread(records.delete, name)
            found: dict[str, Any] = {"deleted": gone}
        else:
            entries = await asyncio.to_thread(records.read, name)
            gone = len(entries)
            rows = [{"role": e.role, "content": e.content, "at": e.at, "facts": dict(e.facts)} for e in entries]
            found = {"id": name, "entries": rows}
        if not gone:
            raise ApiError("there is no such conversation", status=404)
        return JSONResponse(found)

    async def export(self, request: HttpRequest) -> Response:
        lines = await asyncio.to_thread(lambda: "".join(self._records().export()))
        disposition = {"content-disposition": 'attachment; filename="conversations.jsonl"', "cache-control": "no-store"}
        return Response(lines, media_type="application/jsonl", headers=disposition)

    def _records(self) -> Records:
        if self.records is None:
            raise ApiError("this server keeps no conversations (--no-log)", status=404)
        return self.records

    # --- the machine's

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: HttpRequest) -> Response:
        line = self.line
        text = await asyncio.to_thread(
            lambda: self.model.metrics.text(waiting=line.waiting, busy=line.busy, refused=line.refused)
        )
        return Response(text, media_type="text/plain; version=0.0.4")


class _Stream:
    """An answer as server-sent events. Ends the job when the reader goes away or reads nothing for a minute."""

    def __init__(self, job: Job[Event], events: AsyncIterator[Event], first: Event, writer: api_format.Writer) -> None:
        self._job, self._events, self._first, self._writer = job, events, first, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _unless_gone(HttpRequest(scope, receive), self._run(send))
        finally:
            self._job.cancel()

    async def _run(self, send: Send) -> bool:
        async def push(data: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(SEND_S):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        with contextlib.suppress(TimeoutError):
            await push(self._writer.begin())
            try:
                for data in self._written(self._first):
                    await push(data)
                async for event in self._events:
                    for data in self._written(event):
                        await push(data)
            except TimeoutError:
                raise
            except Exception as problem:  # the status is sent: the stream itself must say it
                await push(api_format.error(as_api_error(problem)))
            await push(b"", more=False)
        return True

    def _written(self, event: Event) -> Iterator[bytes]:
        self._writer.add(event)
        yield from self._writer.chunks(event)


def make_app(model: Model, line: Line, *, records: Records | None, settings: Settings) -> ASGIApp:
    """The whole application, its checks in front."""
    return guarded(App(model, line, records, settings))


def guarded(app: App) -> ASGIApp:
    """The application with its checks in front."""
    settings = app.settings
    known = {route.path for route in app.routes()}

    def count(path: str, status: int) -> None:
        name = (
            path
            if path in known
            else next((p for p in known if "{" in p and path.startswith(p.split("{")[0])), "other")
        )
        app.model.metrics.request(name, status)

    async def failed(request: HttpRequest, problem: Exception) -> ASGIApp:
        return _Refusal(as_api_error(problem))

    handlers: dict[Any, Callable[[HttpRequest, Exception], Coroutine[Any, Any, Any]]] = {
        EdgekitError: failed, HTTPException: failed, Exception: failed,
    }  # fmt: skip
    inner = Starlette(routes=list(app.routes()), exception_handlers=handlers)
    return Guard(inner, token=settings.token, hosts=settings.hosts, any_address=settings.any_address, count=count)


def as_api_error(problem: Exception) -> ApiError:
    """Any error as one for the client. What is not the client's doing goes to stderr, and only its kind to him."""
    if isinstance(problem, ApiError):
        return problem
    if isinstance(problem, Full):
        return ApiError(str(problem), status=503, code="overloaded", retry_after_s=problem.retry_after_s)
    if isinstance(problem, ContextOverflow):
        return ApiError(
            f"the messages must fit in the context: {problem.prompt_tokens} tokens, limit {problem.limit}",
            code="context_length_exceeded", param="messages",
        )  # fmt: skip
    if isinstance(problem, UserError):
        return ApiError(str(problem))
    if isinstance(problem, HTTPException):
        return ApiError(str(problem.detail).lower(), status=problem.status_code)
    kind = "" if isinstance(problem, EdgekitError) else "".join(traceback.format_exception(problem))
    print(f"error: {type(problem).__name__}: {problem}\n{kind}", file=sys.stderr, flush=True)
    return ApiError("the server failed at this request; its log says why", status=500)


class _Refusal:
    def __init__(self, problem: ApiError) -> None:
        self._problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, self._problem)


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, and `work` ended, when the client goes away before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _first(events: AsyncIterator[T]) -> T | None:
    return await anext(events, None)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collected(job: Job[T]) -> list[T]:
    """All results of a job; cancels it when cancelled itself."""
    try:
        return [event async for event in job]
    finally:
        job.cancel()


def _file(request: HttpRequest, name: str) -> Response:
    try:
        content, kind, tag = page.file(name)
    except KeyError:
        raise ApiError("there is no such file", status=404) from None
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)
