"""`edgekit chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.run import make_sampling, mention_cut, open_session, sampling_options
from edgekit.errors import ContextOverflow, UserError

if TYPE_CHECKING:
    from edgekit.runtime.sampling import Sampling
    from edgekit.runtime.session import Session
    from edgekit.runtime.template import Message

HELP = "Ctrl-C stops an answer, /reset forgets, /quit or Ctrl-D ends"


@click.command(short_help="Talk with a bundle in the terminal.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", help="Instructions that come before the conversation.")
@sampling_options
def chat(bundle: Path, system: str | None, **options: Any) -> None:
    """Talk with BUNDLE: Ctrl-C stops an answer, /reset forgets, /quit or Ctrl-D ends.

    \b
    edgekit chat small.x86
    """
    sampling = make_sampling(options)
    session = open_session(bundle, options)
    if session.template is None:
        raise UserError(f"chat needs a chat template: {bundle} has none; use edgekit run {bundle} --raw")
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    click.echo(f"{bundle.resolve().name}, {session.engine.context} tokens of context: {HELP}.", err=True)
    while (line := _ask()) not in (None, "/quit"):
        if line == "/reset":
            messages = list(begin)
            click.echo("forgotten", err=True)
        elif line and re.fullmatch("/[a-z]+", line):
            click.echo(f"there is no {line}: {HELP}.", err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(session, messages, sampling, options)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """The next line without the spaces around it, None at the end. A prompt is written for a person only."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and editing
        click.echo()
    try:
        return input("> " if interactive else "").strip()
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return None
    except UnicodeDecodeError as problem:
        raise UserError(f"a message must be UTF-8: {problem.reason} at byte {problem.start}") from problem


def _answer(session: Session, messages: list[Message], sampling: Sampling, options: dict[str, Any]) -> str | None:
    """Print an answer as it comes and return it; Ctrl-C keeps what there is. None when the context is full."""
    pieces = []
    try:
        answer = session.generate(messages, max_tokens=options["max_tokens"], sampling=sampling, stop=options["stop"])
        for piece in answer:
            click.echo(piece, nl=False)
            pieces.append(piece)
        click.echo()
        mention_cut(answer)
    except KeyboardInterrupt:
        click.echo(" [stopped]", err=True)
    except ContextOverflow as full:
        click.echo(f"{full}; /reset forgets the conversation", err=True)
        return None
    return "".join(pieces)
