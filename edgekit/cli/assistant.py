"""`edgekit assistant`: questions about documents, answered in the terminal with sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.chat import _ask
from edgekit.cli.knowledge import embedder_option, open_embedder, open_knowledge, open_prefixes
from edgekit.cli.run import make_sampling, sampling_options
from edgekit.cli.terminal import json_option, print_json
from edgekit.errors import ContextOverflow

if TYPE_CHECKING:
    from edgekit.assistant.answer import Assistant, Citation, Reply
    from edgekit.assistant.reading import Reading
    from edgekit.runtime.template import Message

HELP = "Ctrl-C stops an answer, /reset forgets, /quit or Ctrl-D ends"


@click.command(short_help="Answer questions about documents, with sources.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("question", required=False)
@click.option("--docs", type=click.Path(path_type=Path), required=True, help="A folder, or a file of edgekit index.")
@embedder_option
@click.option(
    "--style",
    type=click.Choice(["quote", "write"]),
    default="quote",
    show_default=True,
    help="quote: the documents' own sentences; write: the model's, for larger models.",
)
@click.option("--document", help="Read one document of --docs whole, its path in there, and answer from that.")
@click.option("--router", type=click.Path(path_type=Path), help="Settings for handing over to a larger model (TOML).")
@click.option("--filter", "policy", type=click.Path(path_type=Path), help="Policy of the content filter (TOML).")
@sampling_options
@json_option
def assistant(
    bundle: Path,
    question: str | None,
    docs: Path,
    embedder: Path | None,
    style: str,
    document: str | None,
    router: Path | None,
    policy: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer QUESTION with BUNDLE from the documents of --docs; without a question, talk.

    \b
    edgekit assistant small.x86 --docs manuals "How is the filter changed?"
    """
    from edgekit.assistant.answer import Assistant
    from edgekit.assistant.filter import Filter, load_policy
    from edgekit.assistant.switch import Switch
    from edgekit.runtime.session import Session

    sampling = make_sampling(options)
    rules = load_policy(policy) if policy else None
    encoder = open_embedder(embedder, threads=options["threads"], quiet=as_json)
    index, changes = open_knowledge(docs, encoder, quiet=as_json)
    switch = Switch.open(router, index) if router else None
    session = Session.open(bundle, context=options["context"], threads=options["threads"], budget=options["budget"])
    helper = Assistant(
        session,
        index,
        router=switch,
        content_filter=Filter(rules, encoder) if rules else None,
        style=style,  # type: ignore[arg-type]
        prefixes=open_prefixes(),
    )
    for skipped in changes.skipped if changes else ():
        click.echo(f"[left out: {skipped.path}: {skipped.reason}]", err=True)
    if document is not None:
        index.whole(document)  # refused now if there is none
    settings = {
        "document": document,
        "max_tokens": options["max_tokens"],
        "sampling": sampling,
        "stop": options["stop"],
    }
    if question is not None:
        reply = _print(helper, question, [], settings, quiet=as_json)
        if as_json:
            print_json(reply)
        return
    click.echo(f"{index.documents} documents, {index.passages} passages: {HELP}.", err=True)
    history: list[Message] = []
    while (line := _ask()) not in (None, "/quit"):
        if line == "/reset":
            history.clear()
            click.echo("forgotten", err=True)
        elif line and line.startswith("/"):
            click.echo(f"there is no {line}: {HELP}.", err=True)
        elif line:
            try:
                reply = _print(helper, line, history, settings, quiet=False)
            except ContextOverflow as full:
                click.echo(f"{full}; ask a shorter question", err=True)
                continue
            except KeyboardInterrupt:
                click.echo(" [stopped]", err=True)
                continue
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": reply.text}]


def _print(helper: Assistant, question: str, history: list[Message], settings: dict[str, Any], *, quiet: bool) -> Reply:
    """Print an answer as it comes, its sources below it; what the router and the filter say goes to stderr."""
    from edgekit.assistant.answer import Filtered, Finished, Opened, Routed, Text
    from edgekit.report import plain

    reply: Reply | None = None
    for event in helper.answer(question, history, **settings):
        if isinstance(event, Finished):
            reply = event.reply
        elif quiet:
            continue
        elif isinstance(event, Text):
            click.echo(_printable(event.text), nl=False)
        elif isinstance(event, Routed):
            where = f"handed over to {event.decision.endpoint}" if event.decision.to == "elsewhere" else "answered here"
            click.echo(f"[{where}: {event.decision.reason}]", err=True)
        elif isinstance(event, Opened):
            click.echo(f"[{_read(event.reading)}]", err=True)
        elif isinstance(event, Filtered):
            click.echo(f"[{event.verdict.action}: {plain(event.verdict.explanation)}]", err=True)
    assert reply is not None
    if not quiet:
        click.echo()
        for citation in reply.citations:
            click.echo(_source(citation))
        if reply.finish_reason in ("length", "context"):
            reason = "--max-tokens reached" if reply.finish_reason == "length" else "the context is full"
            click.echo(f"[cut: {reason}]", err=True)
    return reply


def _read(reading: Reading) -> str:
    from edgekit.report import plain

    how = {"model": "read", "disk": "read before, taken from disk", "memory": "still in memory", "stopped": "stopped"}
    return f"{plain(reading.document)}: {reading.tokens:,} tokens, {how[reading.origin]} in {reading.seconds:.1f} s"


def _printable(text: str) -> str:
    """Text without control characters, with which a document could steer the terminal; lines stay."""
    return "".join(char for char in text if char.isprintable() or char == "\n")


def _source(citation: Citation) -> str:
    from edgekit.report import plain

    heading = f", {plain(citation.heading)}" if citation.heading else ""
    return f"  [{citation.number}] {plain(citation.document)}{heading}, characters {citation.start} to {citation.end}"
