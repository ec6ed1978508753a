"""`edgekit chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.run import make_sampling, sampling_options
from edgekit.errors import ContextOverflow, UserError

if TYPE_CHECKING:
    from edgekit.runtime.session import Session
    from edgekit.runtime.template import Message


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", help="Instructions that come before the conversation.")
@sampling_options
def chat(bundle: Path, system: str | None, **options: Any) -> None:
    """Talk with BUNDLE. Ctrl-C stops an answer, Ctrl-D or /quit ends, /reset forgets.

    \b
    edgekit chat small.x86
    """
    from edgekit.runtime.session import Session

    session = Session.open(bundle, context=options["context"], threads=options["threads"])
    if session.template is None:
        raise UserError(f"chat needs a chat template: {bundle} has none; use edgekit run --raw")
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    click.echo(
        f"{bundle.name}, {session.engine.context} tokens of context. /reset forgets, /quit or Ctrl-D ends.", err=True
    )
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(begin)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(session, messages, options)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _answer(session: Session, messages: list[Message], options: dict[str, Any]) -> str | None:
    """Print an answer as it comes and return it; Ctrl-C keeps what there is. None when the context is full."""
    pieces = []
    try:
        answer = session.generate(
            messages, max_tokens=options["max_tokens"], sampling=make_sampling(options), stop=options["stop"]
        )
        for piece in answer:
            click.echo(piece, nl=False)
            pieces.append(piece)
    except KeyboardInterrupt:
        click.echo(" [stopped]", nl=False, err=True)
    except ContextOverflow as full:
        click.echo(f"{full}\n/reset forgets the conversation.", err=True)
        return None
    click.echo()
    return "".join(pieces)
