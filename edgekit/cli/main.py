"""The command line: `edgekit COMMAND ...`. Parses, calls one library function, prints."""

from __future__ import annotations

import sys
import traceback

import click

from edgekit import __version__
from edgekit.cli.chat import chat
from edgekit.cli.compare import compare
from edgekit.cli.compress import compress
from edgekit.cli.devices import devices
from edgekit.cli.doctor import doctor
from edgekit.cli.eval import evaluate
from edgekit.cli.export import export
from edgekit.cli.inspect import inspect
from edgekit.cli.profile import profile
from edgekit.cli.run import run
from edgekit.errors import EdgekitError


class InOrder(click.Group):
    """Lists the commands in the order in which one uses them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Make language models run well on small devices.

    \b
    edgekit compress smollm2-135m -o small -r int4     a smaller checkpoint
    edgekit export   small -o small.x86 --target x86   a bundle that runs
    edgekit profile  small.x86                         speed and memory on this machine
    edgekit run      small.x86 "What is the capital of France?"
    """


for _command in (compress, export, run, chat, profile, evaluate, inspect, devices, doctor, compare):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; errors become one line on stderr and the exit code of their kind."""
    debug = "--debug" in sys.argv[1:]
    try:
        cli(standalone_mode=False)
    except EdgekitError as problem:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {problem}", err=True)
        sys.exit(problem.exit_code)
    except click.ClickException as problem:
        problem.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
