"""The documents say what is so: their commands parse, their links lead somewhere, their Python imports."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgekit.cli.main import cli
from edgekit.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md") for path in ROOT.glob(pattern))
MENTIONED = re.compile(
    r"(?<![\w/.])(?:benchmarks|devices|docs|edgekit|examples|tests)/[\w./*-]+\.(?:py|md|toml|json|svg|png)\b"
)

# In two parts each, so that this file does not hold them.
FORBIDDEN = re.compile(
    "|".join(("/" r"work\b", "pypi" r"\.", "files" r"\.pythonhosted", "registry" r"\.npmjs", "deb" r"\.debian"))
)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a page: (language, content)."""
    for fenced in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield fenced[2], fenced[3]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """The lines of its blocks that run edgekit, without the shell's prompt; a report's last line is none of them."""
    for _, block in blocks(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if found := re.fullmatch(r"\s*(?:\$ )?(edgekit(?: (?!\d).*)?)", line):
                yield found[1]


def mentions(text: str) -> list[str]:
    """The inline code that runs edgekit, or a part of it: `edgekit profile`."""
    return re.findall(r"`(edgekit [^`\n]+)`", prose(text))


def problem_of_command(line: str, *, whole: bool = True) -> str | None:
    """Why click would not take a command line; None when it would. Nothing is run. `whole`: no argument may lack."""
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((at for at, word in enumerate(words) if re.match(r"[|;&]|\d?[<>]", word)), len(words))]
    command: click.Command = cli
    context = click.Context(cli, **cli.context_settings)
    try:
        while isinstance(command, click.Group):
            _, rest, _ = command.make_parser(context).parse_args(words)
            if not rest:
                return None
            name, found, words = command.resolve_command(context, rest)
            assert found is not None
            command, context = found, click.Context(found, parent=context, info_name=name)
        with contextlib.redirect_stdout(io.StringIO()):
            command.make_context(command.name, words, parent=context.parent)
        return None
    except click.exceptions.Exit:  # --help
        return None
    except click.MissingParameter as problem:
        return problem.format_message() if whole else None
    except (click.ClickException, UserError) as problem:
        return problem.format_message() if isinstance(problem, click.ClickException) else str(problem)


def links(text: str) -> Iterator[str]:
    """The targets of its links and images that are no addresses."""
    text = re.sub(r"`[^`\n]*`", "", prose(text))
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """The fragments that a page's headings make."""
    headings = re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_nowhere(page: Path, target: str) -> bool:
    name, _, fragment = target.partition("#")
    path = (page.parent / name) if name else page
    return not path.exists() or bool(fragment and path.suffix == ".md" and fragment not in anchors(path.read_text()))


def unknown_names(code: str) -> list[str]:
    """What a block of Python imports from edgekit that is not there. Raises SyntaxError when it is no Python."""
    unknown = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "edgekit":
            module = importlib.import_module(str(node.module))
            unknown += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    def test_its_commands_parse(self, page: Path) -> None:
        text = page.read_text()
        found = {line: problem_of_command(line) for line in commands(text)}
        found |= {line: problem_of_command(line, whole=False) for line in mentions(text)}
        assert {line: problem for line, problem in found.items() if problem} == {}

    def test_its_make_targets_are_there(self, page: Path) -> None:
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        code = "\n".join(block for _, block in blocks(page.read_text()))
        assert set(re.findall(r"^(?:\$ )?make ([a-z-]+)", code, re.MULTILINE)) <= targets

    def test_its_links_lead_somewhere(self, page: Path) -> None:
        assert [target for target in links(page.read_text()) if leads_nowhere(page, target)] == []

    def test_the_files_that_it_names_are_there(self, page: Path) -> None:
        named = set(MENTIONED.findall(page.read_text()))
        assert sorted(name for name in named if "NAME" not in name and not list(ROOT.glob(name))) == []

    def test_its_python_imports_what_there_is(self, page: Path) -> None:
        assert [
            name for kind, code in blocks(page.read_text()) if kind == "python" for name in unknown_names(code)
        ] == []


def test_no_file_names_a_machine_s_paths_or_a_registry_s_host() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    found = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and (hit := FORBIDDEN.search(path.read_text(encoding="utf-8", errors="replace"))):
            found.append(f"{name}: {hit[0]}")
    assert found == []


# --- that these checks can fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "edgekit",
        "edgekit --version",
        "edgekit run --help",
        'edgekit run small.x86 "What is it?"   # a question',
        "edgekit compress a/b -o small -r int4 --dry-run",
        "edgekit devices detect > mine.toml",
        "edgekit devices show pi5",
        "edgekit inspect small --json | head -5",
    ],
)
def test_good_commands_are_found_and_parse(line: str) -> None:
    for text in (f"```\n{line}\n```", f"some\n\n```console\n$ {line}\nanswer\n```\n", f"  ```sh\n  {line}\n  ```"):
        assert list(commands(text)) == [line]
    assert problem_of_command(line) is None


@pytest.mark.parametrize(
    "line",
    ["edgekit compres x", "edgekit run small", "edgekit run small hi --loud", "edgekit devices sow", "edgekit --loud"],
)
def test_bad_commands_are_seen(line: str) -> None:
    assert problem_of_command(line)


def test_commands_go_over_lines_and_reports_are_none() -> None:
    text = (
        "edgekit outside\n```\nedgekit run a \\\n    --raw b\nedgekit 0.1.0, python 3.11\nedgekits x\n# edgekit\n```\n"
    )
    assert list(commands(text)) == ["edgekit run a --raw b"]


def test_mentions_may_leave_arguments_out() -> None:
    text = "`edgekit run` and `edgekit run --loud`, `edgekit.bundle`\n```\n`edgekit no`\n```\n"
    assert mentions(text) == ["edgekit run", "edgekit run --loud"]
    assert problem_of_command("edgekit run", whole=False) is None
    assert problem_of_command("edgekit run --loud", whole=False)


def test_links_are_told_from_addresses_and_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: of `two` words\n[a](#a-title-of-two-words) [b](page.md) ![c](absent.png) [d](https://a.b/c)\n"
        "`[e](code.md)` [f](page.md#nothing) [g]\n\n[g]: gone.md\n```\n[h](block.md)\n```\n"
    )
    targets = list(links(page.read_text()))
    assert targets == ["#a-title-of-two-words", "page.md", "absent.png", "page.md#nothing", "gone.md"]
    assert [target for target in targets if leads_nowhere(page, target)] == targets[2:]


def test_mentioned_files_and_hosts_are_found() -> None:
    text = "see `docs/log.md`, benchmarks/*.py and src/docs/no.md"
    assert MENTIONED.findall(text) == ["docs/log.md", "benchmarks/*.py"]
    assert FORBIDDEN.search("cd /" + "work/x")
    assert not FORBIDDEN.search(".github/workflows and networks")
    assert unknown_names("from edgekit.errors import UserError, Nonsense\nimport os") == ["edgekit.errors.Nonsense"]
