"""`edgekit serve`: the OpenAI interface and a chat page over a bundle."""

from __future__ import annotations

import socket
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.knowledge import EMBEDDER, embedder_option, open_embedder, open_knowledge, open_prefixes
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.assistant.records import Records
    from edgekit.assistant.server_metrics import Meter


@click.command(short_help="Serve a bundle: OpenAI's interface and a chat page.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--docs", type=click.Path(path_type=Path), help="Answer from a folder or a file of edgekit index too.")
@embedder_option
@click.option(
    "--style",
    type=click.Choice(["quote", "write"]),
    default="quote",
    show_default=True,
    help="Answers from documents. quote: their own sentences; write: the model's, for larger models.",
)
@click.option("--router", type=click.Path(path_type=Path), help="Settings for handing over to a larger model (TOML).")
@click.option("--filter", "policy", type=click.Path(path_type=Path), help="Policy of the content filter (TOML).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --token.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--token", envvar="EDGEKIT_TOKEN", help="What clients must send (or $EDGEKIT_TOKEN); auto makes one up.")
@click.option("--allow-host", multiple=True, help="Another name that this server is reached by; several times.")
@click.option("--max-tokens", default=1024, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--seconds", default=300.0, show_default=True, help="Longest time for an answer.")
@click.option("--waiting", default=32, show_default=True, type=click.IntRange(0), help="Most requests that wait.")
@click.option(
    "--log", type=click.Path(path_type=Path), help="File of conversations; default: in ~/.local/share/edgekit."
)
@click.option("--no-log", is_flag=True, help="Keep no conversations.")
@click.option("--keep-days", default=30.0, show_default=True, help="Forget older conversations; 0 keeps all.")
@click.option("--power", default="auto", show_default=True, help="Power sensor, or none.")
@click.option("--context", type=int, help="Tokens of context to make room for; default: the bundle's.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
def serve(
    bundle: Path,
    docs: Path | None,
    embedder: Path | None,
    style: str,
    router: Path | None,
    policy: Path | None,
    host: str,
    port: int,
    token: str | None,
    allow_host: tuple[str, ...],
    max_tokens: int,
    seconds: float,
    waiting: int,
    log: Path | None,
    no_log: bool,
    keep_days: float,
    power: str,
    context: int | None,
    threads: int | None,
) -> None:
    """Serve BUNDLE on this machine: /v1/chat/completions and its like, and a chat page in the browser.

    Where BUNDLE is a link, such as the `current` of edgekit deploy, the server goes over to what it leads to later.

    \b
    edgekit serve small.x86 --docs manuals
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as problem:
        raise UserError('serving needs starlette and uvicorn: pip install "edgekit[assistant]"') from problem
    from edgekit.assistant.answer import Assistant
    from edgekit.assistant.filter import Filter, load_policy
    from edgekit.assistant.follow import Follower
    from edgekit.assistant.queue import Line
    from edgekit.assistant.server import App, Settings, guarded
    from edgekit.assistant.server_chat import Model
    from edgekit.assistant.server_guard import is_loopback, new_token, refuse_open_server
    from edgekit.assistant.server_listen import serve as listen
    from edgekit.assistant.server_metrics import Metrics
    from edgekit.assistant.tools import CALCULATOR, clock, search_tool
    from edgekit.report import plain
    from edgekit.runtime.session import Session

    token = new_token() if token == "auto" else token or None  # noqa: S105  the word that asks for one
    refuse_open_server(host, token)
    if router is not None and docs is None:
        raise UserError("--router needs --docs: it was fitted on answers from an index")
    if seconds <= 0:
        raise UserError(f"--seconds must be above 0: got {seconds:g}")
    meter, records = _meter(power), None if no_log else _records(log, keep_days)
    rules = load_policy(policy) if policy is not None else None
    wanted = embedder is not None or docs is not None or (rules is not None and any(r.examples for r in rules.rules))
    encoder = open_embedder(embedder, threads=threads) if wanted else None
    content_filter = Filter(rules, encoder) if rules is not None else None
    tools, index, switch = [CALCULATOR, clock()], None, None
    if docs is not None:
        assert encoder is not None
        from edgekit.assistant.search import search
        from edgekit.assistant.switch import Switch

        index, changes = open_knowledge(docs, encoder)
        for skipped in changes.skipped if changes else ():
            click.echo(f"[left out: {plain(skipped.path)}: {plain(skipped.reason)}]", err=True)
        switch = Switch.open(router, index) if router is not None else None
        tools.append(
            search_tool(lambda query: [(p.document, p.heading, p.text) for p in search(index, query).passages])
        )
    metrics = Metrics()

    def opened(folder: Path) -> Model:
        session = Session.open(folder, context=context, threads=threads)
        assistant = None
        if index is not None:
            assistant = Assistant(
                session,
                index,
                router=switch,
                content_filter=content_filter,
                style=style,  # type: ignore[arg-type]
                prefixes=open_prefixes(),
            )
        return Model(
            name=bundle.name if followed else bundle.resolve().name,  # a name that lasts
            session=session,
            meter=meter,
            metrics=metrics,
            max_tokens=max_tokens,
            assistant=assistant,
            content_filter=content_filter,
            embedder=encoder,
            embedder_name="" if encoder is None else EMBEDDER if embedder is None else embedder.resolve().name,
            tools=tools,
        )

    followed = bundle.is_symlink()
    release = bundle.resolve() if followed else bundle
    model = opened(release)
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104
    here = socket.gethostname()
    names = (*allow_host, *((here, f"{here}.local") if everywhere else () if is_loopback(host) else (host,)))
    settings = Settings(token=token, hosts=names, any_address=everywhere, seconds=seconds)

    def started(real_port: int) -> None:
        shown = "localhost" if is_loopback(host) or everywhere else host
        address = f"http://{shown}:{real_port}/"
        click.echo(f"{model.name}: {address}{f'#token={token}' if token else ''}")
        click.echo(f"OpenAI's interface: {address}v1 (models: {', '.join(model.names)}); Ctrl-C ends", err=True)

    with Line(waiting=waiting) as line:
        app = App(model, line, records, settings)

        def use(model: Model) -> None:
            app.model = model

        def say(what: str) -> None:
            click.echo(plain(f"[{model.name}: {what}]"), err=True)

        with Follower(bundle, release, opened=opened, use=use, say=say) if followed else nullcontext():
            listen(guarded(app), host=host, port=port, started=started)


def _meter(power: str) -> Meter:
    from edgekit.assistant.server_metrics import Meter
    from edgekit.profile.sensors import find_power

    found = find_power(power)
    return Meter(found.source, "" if found.source is not None else found.reason)


def _records(log: Path | None, keep_days: float) -> Records:
    from edgekit.assistant.records import Records, default_path

    return Records.open(log or default_path(), keep_days=keep_days)
