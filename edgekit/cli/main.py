"""The command line: `edgekit COMMAND ...`. Parses, calls one library function, prints."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import NoReturn

import click

from edgekit import __version__
from edgekit.cli.account import account
from edgekit.cli.assistant import assistant
from edgekit.cli.card import card
from edgekit.cli.chat import chat
from edgekit.cli.compare import compare
from edgekit.cli.compress import compress
from edgekit.cli.deploy import deploy, history, rollback, sign
from edgekit.cli.devices import devices
from edgekit.cli.doctor import doctor
from edgekit.cli.embed import embed
from edgekit.cli.eval import evaluate
from edgekit.cli.export import export
from edgekit.cli.fit import fit
from edgekit.cli.heal import heal
from edgekit.cli.index import index
from edgekit.cli.inspect import inspect
from edgekit.cli.profile import profile
from edgekit.cli.reproduce import recompress, reproduce
from edgekit.cli.router import router
from edgekit.cli.run import run
from edgekit.cli.serve import serve
from edgekit.cli.terminal import CommandGroup
from edgekit.errors import BudgetError, EdgekitError, UserError

INTERRUPTED = 128 + 2  # as a shell reports SIGINT


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="edgekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Make language models run well on small devices.

    \b
    edgekit compress smollm2-135m -o small -r int4    a smaller checkpoint
    edgekit export small -o small.x86 --target x86    a bundle that runs
    edgekit profile small.x86                         its speed and memory here
    edgekit run small.x86 "What is the capital of France?"
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (
    compress,
    heal,
    export,
    run,
    chat,
    assistant,
    serve,
    embed,
    index,
    router,
    profile,
    evaluate,
    inspect,
    fit,
    devices,
    doctor,
    compare,
    card,
    sign,
    deploy,
    rollback,
    history,
    reproduce,
    recompress,
    account,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; an error becomes one line on stderr and the exit code of its kind."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]  # it may stand anywhere
    debug = len(arguments) < len(sys.argv) - 1
    try:
        cli(arguments, prog_name="edgekit", standalone_mode=False)
    except click.ClickException as problem:
        _fail(f"error: {_in_our_style(problem)}", 2, debug=debug)
    except EdgekitError as problem:
        _fail(f"error: {problem}", problem.exit_code, debug=debug)
    except OSError as problem:  # one that the library did not foresee, of a file that the user named
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        place = f": {problem.filename}" if problem.filename else ""
        reason = problem.strerror or str(problem)
        _fail(
            f"error: the system refused: {reason}{place}", (BudgetError if full else UserError).exit_code, debug=debug
        )
    except MemoryError as problem:
        hint = "close other programs, or use a smaller model or --context"
        _fail(
            f"error: memory ran out{f' ({problem})' if str(problem) else ''}; {hint}",
            BudgetError.exit_code,
            debug=debug,
        )
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(INTERRUPTED)
    except Exception as problem:
        text = f"{type(problem).__name__}: {problem}"
        hint = "report what stands above" if debug else "run it again with --debug and report what it prints"
        _fail(f"internal error: {text}; this is a bug of edgekit: {hint}", 1, debug=debug)


def _fail(message: str, exit_code: int, *, debug: bool) -> NoReturn:
    from edgekit.report import plain

    if debug:
        traceback.print_exc()
    click.echo(plain(message), err=True)
    sys.exit(exit_code)


def _in_our_style(problem: click.ClickException) -> str:
    """`No such option '--foo'.` -> `no such option '--foo'; see edgekit run --help`."""
    message = problem.format_message().rstrip(".")
    context = problem.ctx if isinstance(problem, click.UsageError) else None
    return f"{message[:1].lower()}{message[1:]}; see {context.command_path if context else 'edgekit'} --help"
