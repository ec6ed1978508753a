"""The session: a bundle that answers.

session = Session.open("small.x86")
for text in session.generate([{"role": "user", "content": "What is the capital of France?"}]):
    print(text, end="", flush=True)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from edgekit.bundle import MODEL, PREFILL, Bundle
from edgekit.errors import ContextOverflow, ModelError, UserError
from edgekit.host import host_device
from edgekit.runtime.budget import PREFILL_CHUNK, MemoryPlan, plan_memory
from edgekit.runtime.control import Encoder
from edgekit.runtime.engine import Engine
from edgekit.runtime.providers import Processor, choose
from edgekit.runtime.sampling import Constraint, Sampler, Sampling
from edgekit.runtime.static import StaticEngine, compiled_name
from edgekit.runtime.template import ChatTemplate, Message
from edgekit.runtime.text import TextStream, whole
from edgekit.runtime.threads import kept

Prompt = str | Sequence[Message]


@dataclass
class Timing:
    """Seconds that each part of one generation took. `gaps` are the times between tokens, the first one after
    the first token."""

    tokenize: float = 0.0
    prefill: float = 0.0
    sample: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Time to first token."""
        return self.tokenize + self.prefill + self.sample


class Session:
    """One loaded bundle and the cache of one conversation.

    It makes one answer at a time: `current` is the latest, and those before it cannot go on. Not for several threads.
    `go_on` is asked before each run of the model, one token or a piece of the prompt: an answer ends where it says no.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine | StaticEngine, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self._encoder = None if template is None else Encoder(tokenizer, template)
        self.current: Generation | None = None
        self.go_on: Callable[[], bool] = lambda: True

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        budget: int | None = None,
        processor: Processor = "auto",
    ) -> Session:
        """Open a bundle. `context` defaults to the bundle's, `threads` to what a sweep found best here for prefill and
        for decode (`edgekit.runtime.threads`), else to the cores that this machine has for it.
        `budget` is how many positions a token attends to exactly, where the bundle has sparse attention. `processor`
        says where a bundle for an NPU runs: see `edgekit.runtime.providers`.

        Raises UserError or ModelError for a bad bundle, BudgetError before loading when memory does not suffice.
        """
        bundle = Bundle.open(Path(path))
        limit = bundle.spec.context_length
        if context is not None and not 0 < context <= limit:
            raise UserError(f"--context must be from 1 to the bundle's {limit}: got {context}")
        if threads is not None and threads < 1:
            raise UserError(f"--threads must be at least 1: got {threads}")
        if budget is not None and not bundle.spec.sparse:
            raise UserError(f"--budget needs sparse attention: {path} has none; export with --attention sparse")
        if budget is not None and not 1 <= budget < 1 << 31:
            raise UserError(f"--budget must be at least 1: got {budget}")
        plan = plan_memory(bundle.spec, context=context or limit)
        plan.refuse_if_too_large()
        tokenizer = _tokenizer(bundle)
        all_cores = threads or host_device().threads or 1
        if bundle.spec.static is not None:
            for name in (PREFILL, *(map(compiled_name, (MODEL, PREFILL)) if bundle.spec.static.compiled else ())):
                bundle.file(name)
            choice = choose(bundle.spec.static.provider, processor)
            static = StaticEngine(bundle.path, bundle.spec, context=context, threads=all_cores, choice=choice)
            return cls(bundle, static, tokenizer, _template(bundle))
        if processor != "auto":
            raise UserError(f"--processor is for bundles of an NPU: {path} is for {bundle.spec.target}")
        prefill, decode = (threads, threads) if threads else kept(bundle) or (all_cores, None)
        engine = Engine(
            bundle.file(MODEL),
            bundle.spec,
            context=context or limit,
            threads=prefill,
            decode_threads=decode,
            budget=budget,
        )
        return cls(bundle, engine, tokenizer, _template(bundle))

    @property
    def memory(self) -> MemoryPlan:
        """What this session was predicted to take."""
        return plan_memory(self.bundle.spec, context=self.engine.context)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of messages through the chat template, where no message makes a control token.

        Raises UserError for an empty prompt, one that gives no tokens, or messages without a template.
        """
        if not prompt:
            raise UserError("the prompt must not be empty: write some text, or at least one message")
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer.encode(prompt).ids
        elif self._encoder is None:
            raise UserError(f"chat needs a chat template: {self.bundle.path} has none; pass plain text (--raw)")
        else:
            ids = self._encoder(prompt)
        if not ids:
            raise UserError(f"the prompt must give tokens: the tokenizer makes none of {prompt!r:.80}")
        return ids

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
    ) -> Generation:
        """Begin an answer; iterate over the result to get its text piece by piece.

        Tokens that the prompt shares with what is in the cache are not computed again. `constraint` is what the answer
        keeps to as far as it goes: `max_tokens` may cut it.
        Raises ContextOverflow when the prompt leaves no room for an answer.
        """
        if max_tokens < 1:
            raise UserError(f"--max-tokens must be at least 1: got {max_tokens}")
        begin = time.perf_counter()
        ids = self.encode(prompt)
        if len(ids) >= self.engine.context:
            raise ContextOverflow(len(ids), self.engine.context, self.bundle.spec.cache_bytes(len(ids)))
        timing = Timing(tokenize=time.perf_counter() - begin)
        return Generation(
            self, ids, max_tokens=max_tokens, sampling=sampling, stop=stop, constraint=constraint, timing=timing
        )


class Generation:
    """An answer in the making. Iterate for its text; the fields are final when the iteration ends.

    `finish_reason`: "stop" (the model ended it, a stop string, or it is all that its constraint allows), "length"
    (max_tokens), "context" (no room left); None where the session was told not to go on.
    """

    def __init__(
        self,
        session: Session,
        ids: list[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        constraint: Constraint | None,
        timing: Timing,
    ) -> None:
        self.prompt_tokens = len(ids)
        self.reused_tokens = 0
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length", "context"] | None = None
        self.timing = timing
        self._session = session
        self._prompt = ids
        self._max_tokens = max_tokens
        self._sampler = Sampler(sampling)
        self._constraint = constraint
        self._stream = TextStream(session.tokenizer, stop=stop)
        self._pieces = self._generate()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def text(self) -> str:
        """Run to the end and return the whole text."""
        return "".join(self._pieces)

    def _generate(self) -> Iterator[str]:
        engine, timing, constraint = self._session.engine, self.timing, self._constraint
        self._session.current = self
        history = list(self._prompt)
        self.reused_tokens = _shared(engine.tokens, history[:-1])  # the last token must run, to give logits
        engine.rewind(self.reused_tokens)
        clock = time.perf_counter()
        for start in range(self.reused_tokens, len(history), PREFILL_CHUNK):
            if not self._session.go_on():
                return
            logits = engine.forward(history[start : start + PREFILL_CHUNK])[-1]
        timing.prefill = time.perf_counter() - clock
        clock = time.perf_counter()
        while True:
            token = self._sampler(logits if constraint is None else constraint.allow(logits), history)
            passed = time.perf_counter() - clock
            if self.tokens:
                timing.gaps.append(passed)
            else:
                timing.sample = passed
            self.tokens.append(token)
            history.append(token)
            if token in self._session.bundle.spec.eos_ids:
                self.finish_reason = "stop"
                break
            if constraint is not None:
                constraint.accept(token)
            if text := self._stream.push(token):
                yield text
            if self._stream.stopped is not None:
                self.finish_reason = "stop"
                return
            if constraint is not None and constraint.done:
                self.finish_reason = "stop"
                break
            if len(self.tokens) >= self._max_tokens:
                self.finish_reason = "length"
                break
            if len(engine.tokens) >= engine.context:
                self.finish_reason = "context"
                break
            if self._session.current is not self:
                raise UserError("a session makes one answer at a time: another began before this one had ended")
            if not self._session.go_on():
                break
            clock = time.perf_counter()  # what the reader of the text does in between is not counted
            logits = engine.forward([token])[-1]
        if text := self._stream.finish():
            yield text


def _shared(cached: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    count = 0
    for a, b in zip(cached, wanted, strict=False):
        if a != b:
            break
        count += 1
    return count


def _tokenizer(bundle: Bundle) -> Tokenizer:
    path = bundle.file("tokenizer.json")
    try:
        return whole(Tokenizer.from_file(str(path)))
    except Exception as problem:  # the library raises plain Exception
        raise ModelError(f"{path} must be a tokenizer: {problem}") from problem


def _template(bundle: Bundle) -> ChatTemplate | None:
    """The chat template: a file of its own, or, in older models, a text or named texts in tokenizer_config.json."""
    config = _tokenizer_config(bundle)
    source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    if bundle.has("chat_template.jinja"):
        source = _text(bundle, "chat_template.jinja")
    return ChatTemplate(source, special_tokens=_special_tokens(config)) if isinstance(source, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like as tokenizer_config.json names them: strings, or tables with `content`."""
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found


def _tokenizer_config(bundle: Bundle) -> dict[str, Any]:
    if not bundle.has("tokenizer_config.json"):
        return {}
    try:
        config = json.loads(_text(bundle, "tokenizer_config.json"))
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"tokenizer_config.json of {bundle.path} must be JSON: {problem}") from problem
    if not isinstance(config, dict):
        raise ModelError(f"tokenizer_config.json of {bundle.path} must hold a JSON object")
    return config


def _text(bundle: Bundle, name: str) -> str:
    try:
        return bundle.file(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise ModelError(f"{name} of {bundle.path} must be UTF-8 text: {problem}") from problem
