"""`edgekit eval`: perplexity of a text, accuracy on multiple choice."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from edgekit.cli.terminal import json_option, output, progress, stages
from edgekit.errors import UserError


@click.command("eval", short_help="Measure perplexity and multiple-choice accuracy.")
@click.argument("target")
@click.option("--text", type=click.Path(path_type=Path), help="A text file (.txt or .txt.gz): perplexity.")
@click.option(
    "--choices", multiple=True, type=click.Path(path_type=Path), help="Questions (.jsonl or .jsonl.gz): accuracy."
)
@click.option("--window", default=1024, show_default=True, help="Tokens of a perplexity window.")
@click.option("--windows", type=int, help="Use only the first N windows.")
@click.option("--limit", type=int, help="Use only the first N questions of each file.")
@click.option("--context", type=int, help="Tokens of context to make room for; default: the model's.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
@click.option("-o", "--output", "saved", type=click.Path(path_type=Path), help="Save the report.")
@json_option
def evaluate(
    target: str,
    text: Path | None,
    choices: tuple[Path, ...],
    window: int,
    windows: int | None,
    limit: int | None,
    context: int | None,
    threads: int | None,
    saved: Path | None,
    as_json: bool,
) -> None:
    """Evaluate TARGET, a bundle or any model source.

    \b
    edgekit eval small.x86 --text book.txt --choices questions.jsonl
    """
    from edgekit.evaluate.choices import accuracy, load_items
    from edgekit.evaluate.perplexity import perplexity
    from edgekit.evaluate.scorer import open_scorer
    from edgekit.evaluate.text import read_text
    from edgekit.manifest import now, versions
    from edgekit.report import Measurement, Report, print_report

    if text is None and not choices:
        raise UserError("eval needs something to evaluate on: pass --text FILE or --choices FILE")
    content = read_text(text) if text else ""
    files = {path: load_items(path, limit=limit) for path in choices}
    names = [path.name for path in files]
    rows = []
    with contextlib.ExitStack() as stack:
        with stages("opening the model", quiet=as_json) as tell:
            scorer = stack.enter_context(open_scorer(target, context=context, threads=threads, on_progress=tell))
        if text:
            with progress(f"perplexity of {text.name}", quiet=as_json) as advance:
                found = perplexity(scorer, content, window=window, max_windows=windows, on_window=advance)
            note = f"{found.windows} windows of {window}, second halves"
            spread = found.spread if found.windows > 1 else None
            rows += [
                Measurement(f"perplexity, {text.name}", found.value, "", n=found.tokens, spread=spread, note=note),
                Measurement(f"bits per byte, {text.name}", found.bits_per_byte, "bit", n=found.tokens),
            ]
        for path, items in files.items():
            name = path.name if names.count(path.name) == 1 else str(path)
            with progress(name, quiet=as_json) as advance:
                share = accuracy(scorer, items, on_item=advance)
            rows += [
                Measurement(f"accuracy, {name}", share.accuracy, "%", n=share.n, spread=share.spread),
                Measurement(
                    f"accuracy by bytes, {name}", share.accuracy_norm, "%", n=share.n, spread=share.spread_norm
                ),
            ]
    report = Report("eval", tuple(rows), versions=versions("numpy", "onnxruntime"), subject=scorer.name, created=now())
    if as_json:
        click.echo(report.to_json())
    else:
        print_report(report, output())
    if saved:
        report.save(saved)  # last, so that a full disk does not take the result with it
