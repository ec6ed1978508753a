"""What the commands share: consoles, progress, and results for machines.

Results go to stdout, progress and remarks to stderr; rich leaves colours out where the output is no terminal. Lines of
text are printed with `click.echo`, which never wraps them; tables and reports go to `output()`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

UNLIMITED = 10_000  # columns


json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class CommandGroup(click.Group):
    """Lists its commands in the order in which one uses them, and names the nearest when there is none of a name."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = args[0] in self.commands or args[0].startswith("-")
        if not known and not context.resilient_parsing:  # that is tab completion
            from edgekit.schema import nearest

            raise UserError(f"no command is called {args[0]!r}{nearest(args[0], self.commands)}")
        return super().resolve_command(context, args)


def output() -> Console:
    """The console for results. Nothing is wrapped in a pipe or a file, and no text is taken for markup."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def remarks() -> Console:
    """The console for progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(result: object) -> None:
    """Print a dataclass, or what JSON knows, as one object."""
    known = dataclasses.is_dataclass(result) and not isinstance(result, type)
    click.echo(json.dumps(dataclasses.asdict(result) if known else result, indent=1, ensure_ascii=False))  # type: ignore[call-overload]


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; gives a function that is told (done, total). Nothing is drawn where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    title_column = TextColumn("{task.description}", markup=False)
    columns = (title_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = remarks()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stages(title: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A moving line on stderr; gives a function that is told what it shall say. Nothing where that is no terminal."""
    console = remarks()
    if quiet or not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(title) as status:
        yield status.update


def size(count: float) -> str:
    """Bytes for a person: `98.4 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
