"""`edgekit profile`: speed, memory and energy of a bundle on this machine or others, or of any ONNX model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.terminal import json_option, output, progress, stages
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.profile.options import Options
    from edgekit.report import Report

FORMATS = (".json", ".csv", ".md", ".html")


@click.command(short_help="Measure a bundle's speed, memory and energy on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--on", "hosts", multiple=True, metavar="HOST",
              help="Measure there: ssh://[USER@]HOST[:PORT] or adb://SERIAL. May be given several times.")  # fmt: skip
@click.option("--stay", is_flag=True, help="With --on: leave edgekit and its packages there for the next time.")
@click.option("-o", "--output", "saved", type=click.Path(path_type=Path), multiple=True,
              help="Save the report; .json (for compare), .csv, .md or .html. May be given several times.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), help="Save the operators' times for Perfetto.")
@click.option("--prompt", type=int, help="Tokens of the prompt.  [default: 512, or half of a small context]")
@click.option("--generate", type=int, help="Tokens to generate.  [default: 128, or a quarter]")
@click.option("--repeat", default=5, show_default=True, help="Repetitions, after one that is discarded.")
@click.option("--context", type=int, help="Tokens of context to make room for; default: the bundle's.")
@click.option("--threads", type=int, help="Default: the cores that this machine has for it.")
@click.option("--settle", default=1.0, show_default=True, help="Seconds of rest before anything else.")
@click.option("--idle", type=float, help="Seconds of idle baseline.  [default: 30 with a power sensor, else 1]")
@click.option("--prompts", type=click.Path(path_type=Path), help="Also answer the texts of this file, one a line.")
@click.option("--depths", help="Also sweep the context: tokens in the cache, as 0,2048,8000.")
@click.option("--sweep-threads", help="Also try thread counts, as 1,2,4, and keep the best for this device.")
@click.option("--no-cold", is_flag=True, help="Leave out the load with the files out of memory.")
@click.option("--no-operators", is_flag=True, help="Leave out the times of operators and layers.")
@click.option("--power", default="auto", show_default=True,
              help="Sensor: none, rapl, pmic, jetson, hwmon, battery, csv:FILE, serial:DEVICE ...")  # fmt: skip
@click.option("--estimate", help="Without a sensor: watts under load and at rest, as 6.5,2.7; marked as estimated.")
@click.option("--grid", type=float, help="Grams of CO2 a kWh, to tell CO2.")
@click.option("--price", type=float, help="Price of a kWh, to tell cost.")
@click.option("--dim", "dims", multiple=True, help="Size of a named dimension of an ONNX model, as height=320.")
@json_option
def profile(
    bundle: Path,
    hosts: tuple[str, ...],
    stay: bool,
    saved: tuple[Path, ...],
    trace: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure BUNDLE, or an ONNX file with made-up inputs: rates, time to first token, memory, energy, what bounds it.

    \b
    edgekit profile small.x86 -o before.json -o before.html
    edgekit profile small.arm --on ssh://pi@raspberrypi
    """
    from edgekit.report import print_report

    for path in saved:
        if path.suffix not in FORMATS:
            raise UserError(f"-o must end in {', '.join(FORMATS)}: got {path}")
    options = make_options(given)
    if stay and not hosts:
        raise UserError("--stay is for other machines: pass --on as well")
    if hosts:
        _profile_there(hosts, bundle, options, stay=stay, saved=saved, trace=trace, as_json=as_json)
        return
    with progress("measuring", quiet=as_json) as advance:
        if bundle.suffix == ".onnx" and not bundle.is_dir():
            from edgekit.profile.any_model import profile_model

            if trace:
                raise UserError("--trace needs a bundle: an ONNX file's operators stand in its report")
            report, events = profile_model(bundle, options, dims=_dims(given["dims"]), on_step=advance), ""
        else:
            from edgekit.profile.run import profile_with_trace

            if given["dims"]:
                raise UserError(f"--dim is for ONNX files: {bundle} is a bundle, whose sizes are known")
            done = profile_with_trace(bundle, options, on_step=advance)
            report, events = done.report, done.trace
    if as_json:
        click.echo(report.to_json())
    else:
        print_report(report, output())
    for path in saved:
        save(report, path)  # last, so that a full disk does not take the result with it
    if trace:
        if not events:
            raise UserError("--trace needs the times of operators: leave out --no-operators")
        _write(trace, events)


def _profile_there(
    hosts: tuple[str, ...],
    bundle: Path,
    options: Options,
    *,
    stay: bool,
    saved: tuple[Path, ...],
    trace: Path | None,
    as_json: bool,
) -> None:
    """Measure on other machines; the errors of some come last, when the reports of the others are safe."""
    from edgekit.profile.remote import profile_on
    from edgekit.report import print_report

    if trace or options.power.startswith("csv:"):
        raise UserError("--trace and --power csv: are for this machine, not for --on")
    doing: dict[str, str] = {}
    with stages("connecting", quiet=as_json) as show:

        def tell(host: str, stage: str) -> None:
            doing[host] = stage
            show("   ".join(f"{name}: {what}" for name, what in doing.items()))

        outcomes = profile_on(hosts, bundle, options, stay=stay, tell=tell)
    reports = {outcome.host: outcome.report for outcome in outcomes if outcome.report}
    if as_json:
        click.echo(json.dumps({host: json.loads(report.to_json()) for host, report in reports.items()}, indent=1))
    else:
        for host, report in reports.items():
            click.echo(f"{host}\n")
            print_report(report, output())
        if len(reports) > 1:
            _print_side_by_side(reports)
    for host, report in reports.items():
        for path in saved:
            name = re.sub(r"\W+", "-", host.partition("://")[2])
            save(report, path if len(hosts) == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}"))
    failed = [outcome.error for outcome in outcomes if outcome.error]
    for problem in failed[:-1]:
        click.echo(f"error: {problem}", err=True)
    if failed:
        raise failed[-1]


def _print_side_by_side(reports: dict[str, Report]) -> None:
    from rich.table import Table

    from edgekit.report import number

    table = Table("measurement", "unit", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for host in reports:
        table.add_column(host, justify="right")
    units = {row.name: row.unit for report in reports.values() for row in report.measurements}
    for name, unit in units.items():
        table.add_row(name, unit, *(number(report.value(name)) for report in reports.values()))
    output().print(table)


def make_options(given: dict[str, Any]) -> Options:
    """The command's options as the library takes them. Raises UserError: a list that is none, a file not readable."""
    from edgekit.profile.options import Options

    return Options(
        prompt_tokens=given["prompt"],
        generate_tokens=given["generate"],
        repetitions=given["repeat"],
        context=given["context"],
        threads=given["threads"],
        settle_s=given["settle"],
        idle_s=given["idle"],
        prompts=_texts(given["prompts"]) if given["prompts"] else (),
        depths=_numbers("--depths", given["depths"], int),
        sweep_threads=_numbers("--sweep-threads", given["sweep_threads"], int),
        cold=not given["no_cold"],
        operators=not given["no_operators"],
        power=given["power"],
        estimate_w=_numbers("--estimate", given["estimate"], float),
        grid_g_per_kwh=given["grid"],
        price_per_kwh=given["price"],
    )


def save(report: Report, path: Path) -> None:
    """Write the report as its suffix says, whole or not at all."""
    if path.suffix == ".json":
        report.save(path)
    elif path.suffix == ".csv":
        _write(path, report.to_csv())
    elif path.suffix == ".md":
        _write(path, report.to_markdown())
    else:
        from edgekit.profile.page import page

        _write(path, page(report))


def _write(path: Path, text: str) -> None:
    from edgekit.folder import explain_write_errors, write_file

    with explain_write_errors(path):
        write_file(path, text.encode())


def _texts(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty."""
    try:
        texts = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--prompts must be a readable text file: {path} ({problem})") from problem
    if not texts:
        raise UserError(f"--prompts must hold a text on each line: {path} is empty")
    return texts


def _numbers(option: str, text: str | None, kind: Any) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in text.split(",")) if text else ()
    except ValueError as problem:
        raise UserError(f"{option} must be numbers with commas between them: got {text!r}") from problem


def _dims(texts: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not size.isdecimal() or not 0 < int(size) < 1 << 24:
            raise UserError(f"--dim must be NAME=SIZE, the size at least 1: got {text!r}")
        found[name] = int(size)
    return found
