"""`edgekit index`: a folder of documents becomes an index."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.knowledge import embedder_option, open_embedder
from edgekit.cli.terminal import json_option, print_json, progress, size


@click.command(short_help="Make or renew the index of a folder of documents.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), required=True, help="The index, one file.")
@embedder_option
@click.option("--vectors", type=click.Choice(["float", "int8", "bit"]), help="How vectors are kept.  [default: int8]")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
@click.option("--force", is_flag=True, help="Take these documents in place of another folder's.")
@json_option
def index(
    folder: Path,
    path: Path,
    embedder: Path | None,
    vectors: str | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Index the text, Markdown, HTML and PDF files below FOLDER. What is there already and has not changed is kept; an
    interrupted run goes on where it was.

    \b
    edgekit index manuals -o kb.db
    """
    from edgekit.assistant.index import Index
    from edgekit.assistant.update import update
    from edgekit.report import plain

    encoder = open_embedder(embedder, threads=threads, quiet=as_json)
    opened = Index.open(path, encoder, create=True, vectors=vectors)  # type: ignore[arg-type]
    try:
        with progress("indexing", quiet=as_json) as tell:
            changes = update(opened, folder, force=force, on_progress=tell)
    finally:
        opened.close()
    if as_json:
        print_json(changes)
        return
    for skipped in changes.skipped:
        click.echo(f"[left out: {plain(skipped.path)}: {plain(skipped.reason)}]", err=True)
    click.echo(
        f"{path}: {changes.added} added, {changes.changed} changed, {changes.removed} removed, {changes.unchanged} as"
        f" before; {changes.passages} passages, {size(path.stat().st_size)}, {changes.seconds:.1f} s"
    )
