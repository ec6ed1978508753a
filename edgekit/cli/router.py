"""`edgekit router`: label answers, fit a router to them, and see what it catches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.knowledge import embedder_option, open_embedder, open_knowledge
from edgekit.cli.terminal import CommandGroup, json_option, output, print_json, progress
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.assistant.router import Evaluation

SHOWN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


@click.group(cls=CommandGroup, short_help="Fit the router that hands hard questions over.")
def router() -> None:
    """Fit the router that hands hard questions over to a larger model: label answers, fit, and check on others.

    \b
    edgekit router label small.x86 questions.jsonl --docs kb.db -o labelled.jsonl
    edgekit router fit labelled.jsonl -o router.json
    edgekit router curve router.json others.jsonl
    """


@router.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("--docs", type=click.Path(path_type=Path), required=True, help="A folder, or a file of edgekit index.")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), required=True, help="The labelled answers.")
@embedder_option
@click.option("--style", type=click.Choice(["quote", "write"]), default="quote", show_default=True, help="Of answers.")
@click.option("--context", type=int, help="Tokens of context to make room for; default: the bundle's.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
def label(
    bundle: Path,
    questions: Path,
    docs: Path,
    path: Path,
    embedder: Path | None,
    style: str,
    context: int | None,
    threads: int | None,
) -> None:
    """Answer QUESTIONS, lines of {"question": ..., "answers": [...]}, with BUNDLE, and note which answers are wrong. A
    run that was interrupted goes on at the next question.

    \b
    edgekit router label small.x86 questions.jsonl --docs kb.db -o labelled.jsonl
    """
    from edgekit.assistant.answer import Assistant
    from edgekit.assistant.label import label as labelled
    from edgekit.assistant.label import load_questions
    from edgekit.assistant.router import load_labelled
    from edgekit.runtime.session import Session

    asked = load_questions(questions)
    done = [example.question for example in load_labelled(path)] if path.exists() else []
    if done != [question.question for question in asked[: len(done)]]:
        raise UserError(f"{path} must hold answers to the first of these questions: it has others; use another -o")
    encoder = open_embedder(embedder, threads=threads)
    index, _ = open_knowledge(docs, encoder)
    session = Session.open(bundle, context=context, threads=threads)
    helper = Assistant(session, index, style=style, watch=True)  # type: ignore[arg-type]
    wrong = 0
    with path.open("a", encoding="utf-8") as stream, progress("labelling") as tell:
        for at, question in enumerate(asked[len(done) :], len(done)):
            tell(at, len(asked))
            example = labelled(helper, index, question)
            stream.write(json.dumps(dataclasses.asdict(example)) + "\n")
            stream.flush()
            wrong += example.wrong
    fresh = len(asked) - len(done)
    click.echo(f"{path}: {fresh} answers added, {wrong} of them wrong")


@router.command()
@click.argument("labelled", type=click.Path(path_type=Path))
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), required=True, help="The router.")
@click.option("--force", is_flag=True, help="Replace the router.")
def fit(labelled: Path, path: Path, force: bool) -> None:
    """Fit a router to LABELLED answers.

    \b
    edgekit router fit labelled.jsonl -o router.json
    """
    from edgekit.assistant.router import fit_router, load_labelled, save

    if path.exists() and not force:
        raise UserError(f"the output must not exist: {path}; choose another name or pass --force")
    examples = load_labelled(labelled)
    save(fit_router(examples), path)
    click.echo(f"{path}: fitted to {len(examples)} answers, {sum(e.wrong for e in examples)} of them wrong")


@router.command()
@click.argument("path", metavar="ROUTER", type=click.Path(path_type=Path))
@click.argument("labelled", type=click.Path(path_type=Path))
@json_option
def curve(path: Path, labelled: Path, as_json: bool) -> None:
    """Show what ROUTER catches of the wrong ones among LABELLED answers, which it must not have been fitted to.

    \b
    edgekit router curve router.json others.jsonl
    """
    from edgekit.assistant.logistic import calibration_error
    from edgekit.assistant.router import evaluate, load, load_labelled

    found = evaluate(load(path), load_labelled(labelled), shares=SHOWN)
    error = calibration_error(found.after, found.wrong)
    if as_json:
        print_json({**dataclasses.asdict(found.curve), "answers": len(found.wrong), "calibration_error": error})
        return
    _print_curve(found, error)


def _print_curve(found: Evaluation, error: float) -> None:
    from rich.table import Table

    table = Table("handed over", "of the wrong answers caught", "right among those kept here", box=None)
    for share, caught, right in zip(found.curve.shares, found.curve.caught, found.curve.right_here, strict=True):
        table.add_row(f"{share:.0%}", f"{caught:.0%}", f"{right:.0%}")
    console = output()
    console.print(f"{len(found.wrong)} answers, {found.wrong.mean():.0%} of them wrong; calibration error {error:.3f}")
    console.print(table)
