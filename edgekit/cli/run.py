"""`edgekit run`: one prompt, one answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.cli.terminal import json_option, print_json
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.runtime.sampling import Constraint, Sampling
    from edgekit.runtime.session import Generation, Session

F = TypeVar("F", bound=Callable[..., Any])


def sampling_options(command: F) -> F:
    """The options that decide how tokens are chosen, the same for run and chat."""
    options: list[Callable[[Any], Any]] = [
        click.option("--max-tokens", default=512, show_default=True, help="Longest answer, in tokens."),
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token."),
        click.option("--top-k", default=0, show_default=True, help="Choose among the k most likely; 0: all."),
        click.option("--top-p", default=1.0, show_default=True, help="Choose within this share of probability."),
        click.option("--min-p", default=0.0, show_default=True, help="Leave out what is rarer than this x the best."),
        click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 avoids repetition."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--stop", multiple=True, help="End the answer at this text; may be given several times."),
        click.option("--context", type=int, help="Tokens of context to make room for; default: the bundle's."),
        click.option("--threads", type=int, help="Default: the cores that this machine has for it."),
        click.option("--budget", type=int, help="Positions attended to exactly, with sparse attention."),
        click.option(
            "--processor",
            type=click.Choice(["auto", "npu", "cpu"]),
            default="auto",
            show_default=True,
            help="Where a bundle for an NPU runs.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_sampling(options: dict[str, Any]) -> Sampling:
    """Take the sampling options out of a command's options."""
    from edgekit.runtime.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: options[name] for name in names})


@click.command(short_help="Answer one prompt with a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--system", help="Instructions that come before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("--schema", type=click.Path(path_type=Path), help="JSON schema, in a file, that the answer keeps to.")
@sampling_options
@json_option
def run(
    bundle: Path, prompt: str, system: str | None, raw: bool, schema: Path | None, as_json: bool, **options: Any
) -> None:
    """Answer PROMPT with BUNDLE. `-` reads the prompt from standard input.

    \b
    edgekit run small.x86 "What is the capital of France?"
    """
    from edgekit.runtime.template import Message

    text = _standard_input() if prompt == "-" else prompt
    sampling = make_sampling(options)
    session = open_session(bundle, options)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    plain = raw or session.template is None or not text  # no text is an error that encode() explains
    answer = session.generate(
        text if plain else messages,
        max_tokens=options["max_tokens"],
        sampling=sampling,
        stop=options["stop"],
        constraint=None if schema is None else _constraint(session, schema),
    )
    if as_json:
        whole = answer.text()
        gaps = answer.timing.gaps
        print_json(
            {
                "text": whole,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "generated_tokens": len(answer.tokens),
                "first_token_ms": answer.timing.first_token * 1e3,
                "tokens_per_second": len(gaps) / sum(gaps) if gaps else None,
            }
        )
        return
    try:
        for piece in answer:
            click.echo(piece, nl=False)
    finally:
        click.echo()  # also when it is interrupted or fails: what comes next begins its own line
    mention_cut(answer)


def open_session(bundle: Path, options: dict[str, Any]) -> Session:
    """A session by the options of `sampling_options`. Where it runs, if not on what it is for, goes to stderr."""
    from edgekit.runtime.session import Session

    names = ("context", "threads", "budget", "processor")
    session = Session.open(bundle, **{name: options[name] for name in names})
    if reason := session.engine.reason:
        click.echo(f"[runs on {session.engine.kernels.removesuffix(f' ({reason})')}: {reason}]", err=True)
    return session


def mention_cut(answer: Generation) -> None:
    """Say on stderr why an answer ended that the model had not ended."""
    if answer.finish_reason != "stop":
        reason = "--max-tokens reached" if answer.finish_reason == "length" else "the context is full"
        click.echo(f"[cut: {reason}]", err=True)


def _constraint(session: Session, schema: Path) -> Constraint:
    """What keeps an answer to the schema in a file."""
    import json

    from edgekit.assistant.structure import Structures

    try:
        parsed = json.loads(schema.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise UserError(f"--schema must be a file of JSON: {schema}: {problem}") from problem
    return Structures.of(session).json_schema(parsed)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as problem:
        raise UserError(f"a prompt must be UTF-8: {problem.reason} at byte {problem.start}") from problem
