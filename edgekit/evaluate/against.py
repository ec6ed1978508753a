"""A/B: one model against another on the same texts and questions, as rows of a report and its worst examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.evaluate.choices import Answer, Item
from edgekit.evaluate.divergence import Divergence
from edgekit.evaluate.paired import (
    SIGNIFICANT,
    PairedMean,
    PairedShare,
    compare_answers,
    mean_interval,
    smooth_changes,
    t_test,
)
from edgekit.report import Measurement, Row, Table

NOTE = "lost: right under A alone; changed: other choices; smooth: answers near a tie count in part"
MARGIN = 2.0  # points: what "no worse" allows where nobody says


@dataclass(frozen=True)
class Example:
    """A question that A answers rightly and B does not. `margin`: nats that B is surer of its wrong choice."""

    task: str
    context: str
    right: str
    chosen: str
    margin: float


@dataclass(frozen=True)
class TaskComparison:
    """B against A on one file of questions: by likelihood, and by likelihood over bytes.

    `smooth` is what smooth accuracy changed by, B - A in points, `smooth_p` its p-value.
    """

    task: str
    plain: PairedShare
    by_bytes: PairedShare
    smooth: PairedMean
    smooth_p: float
    worst: tuple[Example, ...]

    @property
    def changed(self) -> bool:
        """Whether the two models differ by more than chance, at 95%: by the sharper of the tests."""
        return self.smooth_p < SIGNIFICANT


def compare_task(
    task: str, items: Sequence[Item], a: Sequence[Answer], b: Sequence[Answer], *, examples: int = 3
) -> TaskComparison:
    """Compare the answers of two models to `items`, and pick the `examples` that B spoils most."""
    spoiled = [
        (_margin(answer), item, answer)
        for item, before, answer in zip(items, a, b, strict=True)
        if before.right and not answer.right
    ]
    spoiled.sort(key=lambda found: -found[0])
    changes = smooth_changes([x.sums for x in a], [y.sums for y in b], [x.answer for x in a])
    return TaskComparison(
        task,
        compare_answers(
            [answer.right for answer in a],
            [answer.right for answer in b],
            changed=sum(x.picked != y.picked for x, y in zip(a, b, strict=True)),
        ),
        compare_answers(
            [answer.right_norm for answer in a],
            [answer.right_norm for answer in b],
            changed=sum(x.picked_norm != y.picked_norm for x, y in zip(a, b, strict=True)),
        ),
        mean_interval(changes),
        t_test(changes),
        tuple(
            Example(task, item.context, item.choices[item.answer], _chosen(item, answer), margin)
            for margin, item, answer in spoiled[:examples]
        ),
    )


def rows_of_task(found: TaskComparison, *, within: float) -> list[Measurement]:
    """The rows of one task: differences, flips, p-values, and 1 or 0 for "no worse within `within` points"."""
    rows = []
    for label, share in (("accuracy", found.plain), ("accuracy by bytes", found.by_bytes)):
        verdict = share.verdict(within)
        half, note = (
            (share.high - share.low) / 2,
            f"{share.a:.2f} -> {share.b:.2f}; 95%: {share.low:+.2f} {share.high:+.2f}",
        )
        rows += [
            Measurement(
                f"{label} difference, {found.task}", share.difference, "points", n=share.n, spread=half, note=note
            ),
            Measurement(f"{label} worst case, {found.task}", share.worst, "points", n=share.n, note="one-sided 95%"),
            Measurement(f"{label} p-value, {found.task}", share.p_value, "", n=share.flips, note="McNemar, exact"),
            Measurement(
                f"{label} flips, {found.task}",
                100 * share.flips / share.n,
                "%",
                n=share.n,
                note=f"{share.lost} lost, {share.gained} gained, {share.changed} others; {verdict} within {within:g}",
            ),
        ]
    smooth, n, note = found.smooth, found.smooth.n, "sharper: answers near a tie count in part"
    rows += [
        Measurement(
            f"smooth accuracy difference, {found.task}", smooth.mean, "points", n=n, spread=_half(smooth), note=note
        ),
        Measurement(f"smooth accuracy p-value, {found.task}", found.smooth_p, "", n=n, note="paired t"),
    ]
    return rows


def rows_of_divergence(name: str, found: Divergence) -> list[Measurement]:
    """The rows of one text."""
    ratio = math.exp(found.loss.mean)
    bounded = math.isfinite(found.loss.high)
    half = (math.exp(found.loss.high) - math.exp(found.loss.low)) / 2 if bounded else None
    note = f"{found.a:.4f} -> {found.b:.4f}"
    return [
        Measurement(f"perplexity ratio, {name}", ratio, "x", n=found.tokens, spread=half, note=note),
        Measurement(f"KL divergence, {name}", found.kl.mean, "nats", n=found.tokens, spread=_half(found.kl)),
        Measurement(
            f"top-1 agreement, {name}", found.agreement.mean, "%", n=found.tokens, spread=_half(found.agreement)
        ),
    ]


def table_of_tasks(found: Sequence[TaskComparison]) -> Table:
    """One line a task: A, B, difference, interval, p, flips, and smooth accuracy."""
    rows = [
        Row(
            task.task,
            (
                task.plain.a,
                task.plain.b,
                task.plain.difference,
                task.plain.low,
                task.plain.high,
                task.plain.p_value,
                float(task.plain.lost),
                float(task.plain.gained),
                float(task.plain.changed),
                task.smooth.mean,
                task.smooth_p,
            ),
        )
        for task in found
    ]
    columns = ("A, %", "B, %", "B - A", "95% low", "95% high", "p", "lost", "gained", "changed", "smooth B - A", "p")
    return Table("task", columns, tuple(rows), note=NOTE)


def verdict_of(tasks: Sequence[TaskComparison], *, within: float) -> str:
    """One sentence over all tasks: "no worse" only when each is."""
    words = [task.plain.verdict(within) for task in tasks]
    names = {word: [task.task for task, other in zip(tasks, words, strict=True) if other == word] for word in words}
    if "worse" in names:
        return f"worse by more than {within:g} points at 95%: {', '.join(names['worse'])}"
    if "cannot tell" in names:
        return f"cannot tell within {within:g} points at 95%: {', '.join(names['cannot tell'])}; use more questions"
    return f"no worse within {within:g} points at 95% on {', '.join(names['no worse'])}"


def _half(interval: PairedMean) -> float | None:
    half = (interval.high - interval.low) / 2
    return half if math.isfinite(half) else None


def _margin(answer: Answer) -> float:
    if len(answer.sums) == 1:
        return -answer.sums[0]
    return answer.sums[answer.picked] - answer.sums[answer.answer]


def _chosen(item: Item, answer: Answer) -> str:
    return item.choices[answer.picked] if answer.picked >= 0 else "(something else)"
