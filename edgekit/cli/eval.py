"""`edgekit eval`: perplexity of a text and accuracy on multiple choice, of one model or of two against each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.terminal import json_option, output, progress, stages
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.evaluate.against import TaskComparison
    from edgekit.evaluate.choices import Answer, Item
    from edgekit.evaluate.divergence import Divergence
    from edgekit.evaluate.needles import Needle
    from edgekit.evaluate.scorer import Scorer
    from edgekit.report import Report


@click.command("eval", short_help="Measure perplexity and accuracy, of one model or of two.")
@click.argument("target")
@click.argument("other", required=False)
@click.option("--text", type=click.Path(path_type=Path), help="A text file (.txt or .txt.gz): perplexity.")
@click.option(
    "--choices",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Questions (.jsonl or .jsonl.gz), or the name of a file in $EDGEKIT_DATA/eval: accuracy.",
)
@click.option("--needles", type=click.Path(path_type=Path), help="Facts to find in --book (.jsonl): long context.")
@click.option("--book", type=click.Path(path_type=Path), help="The text that they are hidden in.")
@click.option("--length", default=4096, show_default=True, help="Tokens of it, needle and question included.")
@click.option("--safety", is_flag=True, help="Bias, refusals, toxic words, robustness: the sets that edgekit ships.")
@click.option("--window", default=1024, show_default=True, help="Tokens of a perplexity window.")
@click.option("--stride", type=int, help="Begin a window every N tokens and score its last N; of one model.")
@click.option("--windows", type=int, help="Use only the first N windows.")
@click.option("--limit", type=int, help="Use only the first N questions of each file.")
@click.option("--within", default=2.0, show_default=True, help="Of two models: points that OTHER may be worse by.")
@click.option("--examples", default=3, show_default=True, help="Of two models: spoiled answers to show, each task.")
@click.option("--policy", type=click.Path(path_type=Path), help="Rules (TOML) to hold; exit status 1 when one breaks.")
@click.option("--fresh", is_flag=True, help="Measure anew what is known from an earlier run.")
@click.option("--context", type=int, help="Tokens of context to make room for; default: the model's.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
@click.option("-o", "--output", "saved", type=click.Path(path_type=Path), help="Save the report.")
@json_option
def evaluate(
    target: str,
    other: str | None,
    text: Path | None,
    choices: tuple[Path, ...],
    needles: Path | None,
    book: Path | None,
    length: int,
    safety: bool,
    window: int,
    stride: int | None,
    windows: int | None,
    limit: int | None,
    within: float,
    examples: int,
    policy: Path | None,
    fresh: bool,
    context: int | None,
    threads: int | None,
    saved: Path | None,
    as_json: bool,
) -> None:
    """Evaluate TARGET, a bundle or any model source; with OTHER, say what changed from the one to the other.

    \b
    edgekit eval small.x86 --text book.txt --choices questions.jsonl
    edgekit eval smollm2-135m small.x86 --choices questions.jsonl --within 1
    """
    from edgekit.evaluate.against import verdict_of
    from edgekit.evaluate.policy import load_policy
    from edgekit.report import plain, print_report

    if text is None and not choices and not safety and needles is None:
        raise UserError(
            "eval needs something to evaluate on: pass --text FILE, --choices FILE or --safety, or --needles"
        )
    if (needles is None) != (book is None):
        raise UserError("needles are found in a book: pass both --needles FILE and --book FILE")
    if not within >= 0 or examples < 0:
        raise UserError(f"--within and --examples must be at least 0: got {within:g} and {examples}")
    if stride is not None and other is not None:
        raise UserError("--stride is for one model: two are compared window by window")
    rules = load_policy(policy) if policy else None
    run = _Run(
        specs=[target] if other is None else [target, other],
        options={"context": context, "threads": threads},
        fresh=fresh,
        quiet=as_json,
    )
    with run:
        report, tasks = _measure(
            run, text, choices, needles, book, length, safety, window, stride, windows, limit, within, examples
        )
    broken = rules.broken(report) if rules else []
    if as_json:
        click.echo(report.to_json())
    else:
        print_report(report, output())
        for task in tasks:
            for example in task.worst:
                click.echo(plain(f"spoiled, {task.task}: {example.context[-160:]}"))
                click.echo(plain(f"  right: {example.right} | now: {example.chosen} ({example.margin:.2f} nats surer)"))
        if tasks:
            click.echo(f"verdict: {verdict_of(tasks, within=within)}")
    if saved:
        report.save(saved)  # last, so that a full disk does not take the result with it
    for line in broken:
        click.echo(plain(f"broken: {line}"), err=True)
    if rules and not broken and not as_json:
        click.echo(f"policy {policy}: all {len(rules.rules)} rules hold")
    if broken:
        raise SystemExit(1)


def _measure(
    run: _Run,
    text: Path | None,
    choices: tuple[Path, ...],
    needles: Path | None,
    book: Path | None,
    length: int,
    safety: bool,
    window: int,
    stride: int | None,
    windows: int | None,
    limit: int | None,
    within: float,
    examples: int,
) -> tuple[Report, list[TaskComparison]]:
    from edgekit.evaluate import against
    from edgekit.evaluate.choices import Item, load_items, share_of
    from edgekit.evaluate.needles import load_needles
    from edgekit.evaluate.text import read_text
    from edgekit.manifest import now, versions
    from edgekit.report import Measurement, Report

    content = read_text(text) if text else ""
    paths = [_found(path) for path in choices]
    files = {path: load_items(path, limit=limit) for path in paths}
    names = [path.name for path in files]
    rows: list[Measurement] = []
    tables, tasks = {}, []
    if text and len(run.specs) == 1:
        found = run.perplexity(text.name, content, window=window, stride=stride, windows=windows)
        scored = "second halves" if stride is None else f"stride {stride}"
        note = f"{found['windows']} windows of {window}, {scored}"
        spread = found["spread"] if found["windows"] > 1 else None
        rows += [
            Measurement(f"perplexity, {text.name}", found["value"], "", n=found["tokens"], spread=spread, note=note),
            Measurement(f"bits per byte, {text.name}", found["bits_per_byte"], "bit", n=found["tokens"]),
        ]
    elif text:
        far = run.divergence(text.name, content, window=window, windows=windows)
        rows += against.rows_of_divergence(text.name, far)
    asked: list[tuple[str, Sequence[Item], list[list[Answer]]]] = []
    for path, questions in files.items():
        name = path.name if names.count(path.name) == 1 else str(path)
        asked.append((name, questions, [run.answers(side, name, questions) for side in range(len(run.specs))]))
    if needles and book:
        hidden = load_needles(needles)[:limit]
        name = f"needles in {length} tokens"
        questions = [Item(needle.question, (needle.answer,), 0) for needle in hidden]
        prose = read_text(book)
        sides = [run.needles(side, hidden, prose, length=length) for side in range(len(run.specs))]
        asked.append((name, questions, sides))
    for name, items, sides in asked:
        if len(sides) == 1:
            share = share_of(sides[0])
            rows += [
                Measurement(f"accuracy, {name}", share.accuracy, "%", n=share.n, spread=share.spread),
                Measurement(
                    f"accuracy by bytes, {name}", share.accuracy_norm, "%", n=share.n, spread=share.spread_norm
                ),
            ]
        else:
            task = against.compare_task(name, items, *sides, examples=examples)
            rows += against.rows_of_task(task, within=within)
            tasks.append(task)
    if tasks:
        tables["tasks"] = against.table_of_tasks(tasks)
    if safety:
        from edgekit.evaluate.safety import rows_of_safety

        first = run.safety(0)
        rows += rows_of_safety(first, run.safety(1) if len(run.specs) > 1 else None)
    subject = " -> ".join(run.names)
    report = Report(
        "eval",
        tuple(rows),
        versions=versions("numpy", "onnxruntime"),
        subject=subject,
        created=now(),
        tables=tables,
        conditions={f"digest {side}": digest[:16] for side, digest in zip("AB", run.digests, strict=False)},
    )
    return report, tasks


class _Run:
    """The models of one evaluation: opened when a result is not known yet."""

    def __init__(self, specs: Sequence[str], *, options: dict[str, int | None], fresh: bool, quiet: bool) -> None:
        from edgekit.evaluate.cache import model_digest

        self.specs = specs
        self.digests = [model_digest(spec) for spec in specs]
        self.names = [Path(spec).resolve().name if os.path.exists(spec) else spec for spec in specs]
        self._options, self._fresh, self._quiet = options, fresh, quiet
        self._open: dict[int, Scorer] = {}
        self._told = False  # that the cache cannot be written
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    def scorer(self, index: int) -> Scorer:
        from edgekit.evaluate.scorer import open_scorer

        if index not in self._open:
            with stages(f"opening {self.names[index]}", quiet=self._quiet) as tell:
                self._open[index] = self._stack.enter_context(
                    open_scorer(self.specs[index], on_progress=tell, **self._options)
                )
        return self._open[index]

    def _cached(self, kind: str, sides: Sequence[int], facts: dict[str, object], compute: Any) -> Any:
        from edgekit.evaluate.cache import cached

        key = {"kind": kind, "models": [self.digests[side] for side in sides], **self._options, **facts}
        return cached(key, compute, fresh=self._fresh, on_trouble=self._tell)

    def _tell(self, why: str) -> None:
        from edgekit.report import plain

        if not self._told:
            click.echo(plain(f"[{why}]"), err=True)
        self._told = True

    def perplexity(
        self, name: str, text: str, *, window: int, stride: int | None, windows: int | None
    ) -> dict[str, Any]:
        import dataclasses

        from edgekit.evaluate.cache import text_digest
        from edgekit.evaluate.perplexity import perplexity

        def compute() -> dict[str, Any]:
            scorer = self.scorer(0)
            with progress(f"perplexity of {name}", quiet=self._quiet) as advance:
                found = perplexity(scorer, text, window=window, stride=stride, max_windows=windows, on_window=advance)
            return dataclasses.asdict(found)

        facts: dict[str, object] = {"text": text_digest(text), "window": window, "stride": stride, "windows": windows}
        found: dict[str, Any] = self._cached("perplexity", [0], facts, compute)
        return found

    def divergence(self, name: str, text: str, *, window: int, windows: int | None) -> Divergence:
        import dataclasses

        from edgekit.evaluate.cache import text_digest
        from edgekit.evaluate.divergence import Divergence, divergence
        from edgekit.evaluate.paired import PairedMean

        def compute() -> dict[str, Any]:
            a, b = self.scorer(0), self.scorer(1)
            with progress(f"reading {name} with both", quiet=self._quiet) as advance:
                found = divergence(a, b, text, window=window, max_windows=windows, on_window=advance)
            return dataclasses.asdict(found)

        facts: dict[str, object] = {"text": text_digest(text), "window": window, "windows": windows}
        data = self._cached("divergence", [0, 1], facts, compute)
        kl, agreement, loss = (PairedMean(**data[key]) for key in ("kl", "agreement", "loss"))
        return Divergence(kl, agreement, loss, data["a"], data["b"], data["tokens"])

    def answers(self, index: int, name: str, items: Sequence[Item]) -> list[Answer]:
        from edgekit.evaluate.cache import text_digest
        from edgekit.evaluate.choices import Answer, answers

        def compute() -> list[list[Any]]:
            scorer = self.scorer(index)
            with progress(f"{name}, {self.names[index]}", quiet=self._quiet) as advance:
                found = answers(scorer, items, on_item=advance)
            return [[each.picked, each.picked_norm, each.answer, list(each.sums)] for each in found]

        rows = self._cached("answers", [index], {"items": text_digest(repr(list(items)))}, compute)
        return [Answer(picked, normed, right, tuple(sums)) for picked, normed, right, sums in rows]

    def needles(self, index: int, hidden: Sequence[Needle], book: str, *, length: int) -> list[Answer]:
        from edgekit.evaluate.cache import text_digest
        from edgekit.evaluate.choices import Answer
        from edgekit.evaluate.needles import find_needles

        def compute() -> list[list[Any]]:
            scorer = self.scorer(index)
            with progress(f"needles, {self.names[index]}", quiet=self._quiet) as advance:
                found = find_needles(scorer, book, hidden, context=length, on_item=advance)
            return [[each.picked, list(each.sums)] for each in found]

        facts: dict[str, object] = {"needles": text_digest(repr(list(hidden))), "book": text_digest(book)}
        rows = self._cached("needles", [index], facts | {"length": length}, compute)
        return [Answer(picked, picked, 0, tuple(sums)) for picked, sums in rows]

    def safety(self, index: int) -> Any:
        from edgekit.evaluate.safety import Safety, load_sets, measure_safety

        sets = load_sets()

        def compute() -> dict[str, Any]:
            scorer = self.scorer(index)
            with progress(f"safety, {self.names[index]}", quiet=self._quiet) as advance:
                return measure_safety(scorer, sets, on_item=advance).to_dict()

        return Safety.from_dict(self._cached("safety", [index], {"sets": sets.digest}, compute))


def _found(path: Path) -> Path:
    """The file, or the one of this name among the data for evaluation."""
    base = os.environ.get("EDGEKIT_DATA")
    if base and not path.exists() and len(path.parts) == 1:
        for name in (path.name, f"{path.name}.jsonl.gz", f"{path.name}.jsonl"):
            if (found := Path(base) / "eval" / name).is_file():
                return found
    return path
