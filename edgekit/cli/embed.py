"""`edgekit embed`: texts become vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgekit.cli.run import _standard_input
from edgekit.cli.terminal import json_option, print_json
from edgekit.errors import UserError


@click.command(short_help="Turn texts into vectors with an encoder bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("--truncate", is_flag=True, help="Embed the beginning of a text that is too long, and say so.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
@click.option(
    "--processor",
    type=click.Choice(["auto", "npu", "cpu"]),
    default="auto",
    show_default=True,
    help="Where a bundle for an NPU runs.",
)
@json_option
def embed(
    bundle: Path,
    texts: tuple[str, ...],
    truncate: bool,
    threads: int | None,
    processor: Literal["auto", "npu", "cpu"],
    as_json: bool,
) -> None:
    """Embed TEXTS with BUNDLE. `-` reads one text a line from standard input; of two texts or more the cosine of each
    with the first is shown, and with --json the vectors.

    \b
    edgekit embed minilm.x86 "a cat on a mat" "a kitten on a rug" --json
    """
    from edgekit.report import plain
    from edgekit.runtime.embeddings import Embedder, cosines

    rows = _standard_input().splitlines() if texts == ("-",) else list(texts)
    if not rows:
        raise UserError("embed needs texts: name them, or pass - and one text a line on standard input")
    embedder = Embedder.open(bundle, threads=threads, processor=processor)
    if reason := getattr(embedder.encoder, "reason", ""):
        click.echo(f"[runs on {embedder.encoder.kernels.split(' (')[0]}: {reason}]", err=True)
    result = embedder.encode(rows, truncate=truncate)
    for index in result.truncated:
        click.echo(f"[cut: text {index} has {result.tokens[index]} tokens]", err=True)
    if as_json:
        print_json(
            {
                "dim": result.vectors.shape[1],
                "embeddings": [[float(f"{x:.7g}") for x in row] for row in result.vectors.tolist()],
                "tokens": list(result.tokens),
                "truncated": list(result.truncated),
            }
        )
        return
    for text, cosine, tokens in zip(rows, cosines(result.vectors), result.tokens, strict=True):
        click.echo(f"{cosine:7.4f}  {result.vectors.shape[1]} numbers, {tokens} tokens  {plain(text)[:60]}")
