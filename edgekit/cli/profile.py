"""`edgekit profile`: speed and memory of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import json_option, output, progress


@click.command(short_help="Measure a bundle's speed and memory on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", "saved", type=click.Path(path_type=Path), help="Save the report, for edgekit compare.")
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--generate", default=128, show_default=True, help="Tokens to generate.")
@click.option("--repeat", default=5, show_default=True, help="Repetitions, after one that is discarded.")
@click.option("--context", type=int, help="Tokens of context to make room for; default: the bundle's.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
@json_option
def profile(
    bundle: Path,
    saved: Path | None,
    prompt: int,
    generate: int,
    repeat: int,
    context: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure BUNDLE: prefill and decode rates, time to first token, memory.

    \b
    edgekit profile small.x86 -o before.json
    """
    from edgekit.profile.latency import profile as measure
    from edgekit.report import print_report

    with progress("measuring", quiet=as_json) as advance:
        report = measure(
            bundle,
            prompt_tokens=prompt,
            generate_tokens=generate,
            repetitions=repeat,
            context=context,
            threads=threads,
            on_repetition=advance,
        )
    if as_json:
        click.echo(report.to_json())
    else:
        print_report(report, output())
    if saved:
        report.save(saved)  # last, so that a full disk does not take the result with it
