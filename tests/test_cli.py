"""The command line as a user meets it: the whole tour, JSON, streams, help, interrupts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy
from command_line import ek, listing, ok
from numpy.typing import NDArray
from tiny import tiny_folder, tiny_gguf

from edgekit.cli import terminal
from edgekit.cli.main import cli
from edgekit.report import Report
from edgekit.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).parent.parent
COMMANDS = (
    "compress",
    "heal",
    "export",
    "run",
    "chat",
    "assistant",
    "serve",
    "embed",
    "index",
    "router",
    "profile",
    "eval",
    "inspect",
    "fit",
    "devices",
    "doctor",
    "compare",
    "card",
    "sign",
    "deploy",
    "rollback",
    "history",
    "reproduce",
    "recompress",
    "account",
)
SHORT = ("--settle", "0", "--idle", "0", "--no-operators", "--no-cold")
QUICK = ("--prompt", "8", "--generate", "8", "--repeat", "4", *SHORT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.gguf, the checkpoint `small`, the bundle `small.run` and things to evaluate on."""
    home = tmp_path_factory.mktemp("home")
    tiny_gguf(home / "tiny.gguf")
    ok("compress", home / "tiny.gguf", "-o", home / "small")
    ok("export", home / "small", "-o", home / "small.run", "--target", "portable")
    (home / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    item = {"context": "The quick brown", "choices": ["fox", "network", "sun"], "answer": 0, "id": "of no interest"}
    (home / "questions.jsonl").write_text(json.dumps(item) + "\n")
    for name in ("before.json", "after.json"):
        ok("profile", home / "small.run", *QUICK, "-o", home / name)
    return home


@pytest.fixture
def home(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the current one; what a test writes goes elsewhere."""
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("target", ["portable", "x86", "arm"])
def test_the_whole_tour(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_gguf(Path("tiny.gguf"))
    Path("book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    bundle = f"small.{target}"

    done = ok("compress", "tiny.gguf", "-o", "small", "-r", "int4")
    assert re.match(
        r"small: [\d.]+ kB as float32 -> [\d.]+ kB \([\d.]+x smaller\), recipe int4\n  quant.int4: 15 mat", done.out
    )
    done = ok("export", "small", "-o", bundle, "--target", target)
    assert f"{bundle}: a bundle for {target}\n" in done.out
    assert "parity: top-1 agreement" in done.out
    done = ok("profile", bundle, *QUICK, "-o", "a.json")
    assert {"pp8", "tg8", "time to first token", "load, cold"} <= {
        row.name for row in Report.load(Path("a.json")).measurements
    }
    assert "pp8" in done.out
    done = ok("run", bundle, "The quick", "--max-tokens", "4")
    assert done.out.endswith("\n")
    assert done.err in ("", "[cut: --max-tokens reached]\n")
    done = ok("eval", bundle, "--text", "book.txt", "--window", "32", "-o", "eval.json")
    assert "perplexity, book.txt" in done.out
    assert Report.load(Path("eval.json")).subject == bundle
    done = ok("inspect", bundle)
    assert f"LlamaForCausalLM for {target}: 2 layers" in done.out
    assert "quant.int4: 15 matrices" in done.out
    ok("profile", bundle, *QUICK, "-o", "b.json")
    done = ok("compare", "a.json", "b.json")
    assert re.search(r"^pp8 +[\d.,]+ +[\d.,]+ +tok/s", done.out, re.MULTILINE)
    done = ok("chat", bundle, "--max-tokens", "3", stdin="hello\n/reset\n/quit\nnever read\n")
    assert len(done.out.splitlines()) >= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tiny.gguf", "book.txt", "small", bundle, "a.json", "b.json", "eval.json"),
    }


def test_a_recipe_file_and_a_device_file(home: Path, tmp_path: Path) -> None:
    recipe, device = tmp_path / "mine.toml", tmp_path / "board.toml"
    recipe.write_text('name = "mine"\n[[step]]\nuse = "quant.int8"\nblock = 64\n')
    device.write_text(ok("devices", "show", "pi5").out)
    assert "recipe mine" in ok("compress", "tiny.gguf", "-o", tmp_path / "small", "-r", recipe).out
    assert "a bundle for arm" in ok("export", tmp_path / "small", "-o", tmp_path / "run", "-d", device).out
    assert "LlamaForCausalLM for arm" in ok("inspect", tmp_path / "run").out


def test_force_replaces_what_edgekit_wrote(home: Path, tmp_path: Path) -> None:
    for recipe in ("int4", "int8"):
        ok("compress", "tiny.gguf", "-o", tmp_path / "small", "-r", recipe, "--force")
        ok("export", tmp_path / "small", "-o", tmp_path / "run", "--force")
    assert "quant.int8: 15 matrices" in ok("inspect", tmp_path / "run").out
    assert {path.name for path in tmp_path.iterdir()} == {"small", "run"}


def test_every_source_can_be_inspected_exported_and_evaluated(home: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "folder")
    for source, named in ((home / "tiny.gguf", "tiny.gguf"), (folder, "folder"), (home / "small", "small")):
        assert "15 matrices\n" in ok("inspect", source).out
        assert f"eval\n{named}\n" in ok("eval", source, "--choices", "questions.jsonl").out
    assert "folder" in ok("export", folder, "-o", tmp_path / "run").out


def test_a_bundle_is_called_by_its_folder_also_from_inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home / "small.run")
    assert (
        json.loads(ok("eval", ".", "--text", "../book.txt", "--window", "32", "--json").out)["subject"] == "small.run"
    )
    assert json.loads(ok("profile", ".", *QUICK, "--json").out)["subject"].startswith("small.run ")
    assert ok("chat", ".").err.startswith("small.run, 256 tokens")


# --- JSON -------------------------------------------------------------------------------------------------------------

REPORT = {
    *("title", "measurements", "machine", "versions", "subject", "samples", "created", "schema"),
    *("conditions", "flags", "series", "tables"),
}
MANIFEST = {
    "kind",
    "source",
    "files",
    "recipe",
    "recipe_sha256",
    "seed",
    "steps",
    "measurements",
    "versions",
    "created",
}
JSON: list[tuple[tuple[str, ...], set[str]]] = [
    (("compress", "tiny.gguf", "-o", "OUT"), MANIFEST | {"schema"}),
    (
        ("compress", "tiny.gguf", "--dry-run"),
        {"recipe", "blocks", "before_bytes", "after_bytes", "peak_memory", "seconds"},
    ),
    (("export", "small", "-o", "OUT"), MANIFEST | {"schema"}),
    (
        ("run", "small.run", "hello", "--max-tokens", "3"),
        {"text", "finish_reason", "prompt_tokens", "generated_tokens", "first_token_ms", "tokens_per_second"},
    ),
    (("profile", "small.run", *QUICK), REPORT),
    (("eval", "small.run", "--text", "book.txt", "--window", "32", "--choices", "questions.jsonl"), REPORT),
    (("inspect", "small.run"), {"manifest", "runtime"}),
    (("inspect", "small"), {"manifest", "source", "config", "matrices"}),
    (("inspect", "tiny.gguf"), {"manifest", "source", "config", "matrices"}),
    (("devices",), {"name", "title", "arch", "threads", "features"}),
    (("devices", "detect"), {"name", "title", "arch", "clusters", "sources"}),
    (("devices", "show", "pi5"), {"name", "title", "arch", "clusters", "sources"}),
    (("doctor",), {"versions", "kernels", "machine", "threads", "memory_available_bytes", "missing"}),
    (
        ("compare", "before.json", "after.json"),
        {"name", "unit", "a", "b", "ratio", "low", "high", "p_value", "verdict", "note"},
    ),
]


@pytest.mark.parametrize(("words", "keys"), JSON, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_json_is_the_whole_output_and_has_its_keys(
    words: tuple[str, ...], keys: set[str], home: Path, tmp_path: Path
) -> None:
    done = ok(*(str(tmp_path / "out") if word == "OUT" else word for word in words), "--json")
    found = json.loads(done.out)
    first: dict[str, Any] = found[0] if isinstance(found, list) else found
    assert keys <= first.keys() if words[0] == "devices" else keys == first.keys()
    assert done.err == ""


def test_every_command_but_chat_prints_json() -> None:
    """And the table above leaves none out."""
    with_json = {name for name, command in cli.commands.items() if any(p.name == "as_json" for p in command.params)}
    # They need an encoder, torch, a store or records: tests of their own.
    elsewhere = {"embed", "index", "assistant", "heal", "fit", "deploy", "rollback", "history", "reproduce", "account"}
    without = {"chat", "serve", "router", "card", "sign", "recompress"}
    assert with_json == set(COMMANDS) - without == {words[0] for words, _ in JSON} | elsewhere


def test_devices_are_toml_that_can_be_read_back() -> None:
    for words in (("detect",), ("show", "pi5")):
        assert tomllib.loads(ok("devices", *words).out)["clusters"]
    assert "\nhost " in ok("devices").out


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [words for words, _ in JSON], ids=" ".join)
def test_pipes_get_results_on_stdout_without_escape_codes_or_wrapping(
    words: tuple[str, ...], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    done = ok(*(str(tmp_path / "out") if word == "OUT" else word for word in words))
    assert done.out.strip()
    assert "\x1b" not in done.out + done.err
    assert done.err in ("", "[cut: --max-tokens reached]\n")
    for line in done.out.splitlines():
        assert not line.startswith((", ", "- ")), "a line was broken"
    if words[0] == "eval":
        assert "accuracy by bytes, questions.jsonl" in done.out


def test_progress_is_drawn_on_a_terminal_and_only_on_stderr(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    def on_terminal() -> Console:
        return Console(stderr=True, force_terminal=True, width=80, markup=False)

    monkeypatch.setattr(terminal, "remarks", on_terminal)
    named = tmp_path / "[red]book[bold].txt"
    named.write_text((home / "book.txt").read_text())
    done = ok("eval", "small.run", "--text", named, "--window", "32", "--json")
    assert json.loads(done.out)
    assert done.err == "", "--json is for programs"
    done = ok("eval", "small.run", "--text", named, "--window", "32", "--fresh")
    assert "\x1b[" in done.err
    assert "perplexity of [red]book[bold].txt" in done.err
    assert "perplexity, [red]book[bold].txt" in done.out
    assert "\x1b" not in done.out


def test_foreign_text_is_neither_markup_nor_does_it_steer_the_terminal(home: Path, tmp_path: Path) -> None:
    report = json.loads((home / "before.json").read_text())
    report["measurements"][0]["name"] = "[red]pp8[/nothing]\x1b[2J"
    report["samples"] = {}
    (tmp_path / "[b]a.json").write_text(json.dumps(report))
    done = ok("compare", tmp_path / "[b]a.json", tmp_path / "[b]a.json")
    assert "\n[red]pp8[/nothing][2J " in done.out
    assert "\x1b" not in done.out
    assert "[b]a" in done.out
    folder = tiny_folder(tmp_path / "evil\x1b[2J")
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    extra = {"model.\x1b[2J[red].weight": np.zeros((2, 3), np.float32)}
    safetensors.numpy.save_file({**tensors, **extra}, folder / "model.safetensors")
    done = ok("inspect", folder)
    assert "evil[2J (folder), licence other\n" in done.out
    assert "\nmodel.[2J[red] " in done.out
    assert "\x1b" not in done.out


def test_an_answer_can_be_told_from_the_remark_that_it_was_cut(home: Path) -> None:
    done = ok("run", "small.run", "The quick", "--max-tokens", "2")
    whole = json.loads(ok("run", "small.run", "The quick", "--max-tokens", "2", "--json").out)
    assert whole["finish_reason"] == "length"
    assert done.out == whole["text"] + "\n"
    assert done.err == "[cut: --max-tokens reached]\n"
    assert ok("run", "small.run", "The quick").err == "[cut: the context is full]\n"


def test_the_prompt_may_come_from_standard_input(home: Path) -> None:
    words = ("--max-tokens", "5", "--json")
    piped, given = (
        json.loads(done.out)
        for done in (ok("run", "small.run", "-", *words, stdin="Größe\n"), ok("run", "small.run", "Größe\n", *words))
    )
    assert (piped["text"], piped["prompt_tokens"]) == (given["text"], given["prompt_tokens"])


def test_raw_leaves_the_template_out(home: Path) -> None:
    counts = [
        json.loads(ok("run", "small.run", "The", "--max-tokens", "1", "--json", *raw).out)["prompt_tokens"]
        for raw in ((), ("--raw",), ("--system", "The"))
    ]
    assert counts[1] < counts[0] < counts[2]


def test_the_result_is_shown_also_when_it_cannot_be_saved(home: Path) -> None:
    for words in (("profile", "small.run", *QUICK), ("eval", "small.run", "--text", "book.txt", "--window", "32")):
        done = ek(*words, "-o", "tiny.gguf/report.json")
        assert done.status == 2
        assert done.out.startswith(words[0] + "\n")
        assert done.err.startswith("error: the output must be writable: tiny.gguf/report.json")


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_touches_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(home)
    done = ok("compress", "tiny.gguf", "-o", "planned", "-r", "int8", "--dry-run")
    recipe, _, table = done.out.partition("block ")
    assert tomllib.loads(recipe.rpartition("\n")[0])["step"][0]["use"] == "quant.int8"
    assert re.search(r"^all +0.35 +0.\d\d$", table, re.MULTILINE)
    assert "(predicted)" in table
    assert listing(home) == before


# --- help -------------------------------------------------------------------------------------------------------------


def commands(group: click.Group, prefix: Sequence[str] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*prefix, name))
        if isinstance(command, click.Group):
            found += commands(command, (*prefix, name))
    return found


@pytest.mark.parametrize("words", commands(cli), ids=" ".join)
def test_help_ends_well_and_has_an_example_that_parses(words: tuple[str, ...]) -> None:
    done = ok(*words, "--help")
    assert done.out.startswith(f"Usage: edgekit {' '.join(words)} ")
    assert ok(*words, "-h").out == done.out
    assert f"\n  edgekit {' '.join(words)}" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_the_list_of_commands_is_in_the_order_of_use_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = ok("--help")
    assert tuple(re.findall(r"^  ([a-z]+)  +[A-Z]", done.out, re.MULTILINE)) == COMMANDS
    assert "..." not in done.out.partition("Commands:")[2]
    assert max(map(len, done.out.splitlines())) <= 80
    assert ok().out == done.out
    assert re.fullmatch(r"edgekit, version \d+\.\d+\.\d+\n", ok("--version").out)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['edgekit', '--help']\n"
        "from edgekit.cli.main import main; main()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "click" in loaded
    heavy = {"numpy", "onnxruntime", "tokenizers", "jinja2", "psutil", "rich", "onnx", "safetensors", "gguf", "torch"}
    assert not loaded & heavy


def test_completion_knows_the_commands() -> None:
    def complete(line: str, word: int) -> str:
        code = "from edgekit.cli.main import main; main()"
        variables = {"_EDGEKIT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(word)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}
        )
        assert done.stderr == ""
        return done.stdout

    assert complete("edgekit comp", 1) == "plain,compress\nplain,compare\n"
    assert complete("edgekit nonsense --", 2)


# --- chat -------------------------------------------------------------------------------------------------------------


def test_a_chat_remembers_and_reset_forgets(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.runtime.template import ChatTemplate

    seen: list[list[str]] = []
    render = ChatTemplate.render

    def watched(self: ChatTemplate, messages: Any, *rest: Any, **options: Any) -> str:
        seen.append([f"{message['role']}: {message['content']}" for message in messages])
        return render(self, messages, *rest, **options)

    monkeypatch.setattr(ChatTemplate, "render", watched)
    lines = "one\n\n   \ntwo\n/reset\nthree\n/rest\n/quit\nfour\n"
    done = ok("chat", "small.run", "--max-tokens", "2", "--system", "be brief", stdin=lines)
    assert [len(messages) for messages in seen] == [2, 4, 2]
    assert [messages[0] for messages in seen] == ["system: be brief"] * 3
    assert [messages[-1] for messages in seen] == ["user: one", "user: two", "user: three"]
    assert seen[1][2].removeprefix("assistant: ") in done.out
    assert "> " not in done.out, "no prompt for a pipe"
    assert "there is no /rest: " in done.err


def test_a_chat_ends_with_its_input(home: Path) -> None:
    for stdin in ("", "hello", "hello\n", "/quit\n"):
        done = ok("chat", "small.run", "--max-tokens", "2", stdin=stdin)
        assert bool(done.out) is stdin.startswith("hello")
        assert done.err.startswith("small.run, 256 tokens of context")


def test_a_full_context_ends_no_chat_and_the_message_is_forgotten(home: Path) -> None:
    words = ("chat", "small.run", "--max-tokens", "2", "--context", "120")
    done = ok(*words, stdin="hello\n" + "much " * 60 + "\nhello\n")
    (full,) = re.findall(r"the prompt must fit in the context: .*", done.err)
    assert re.search(r"context: \d{3} tokens, limit 120 .*; /reset forgets", full)
    assert done.err.count("[cut: --max-tokens reached]") == 2


def interrupt(monkeypatch: pytest.MonkeyPatch, *, call: int) -> None:
    """Let the engine's `call`-th forward pass from now on be interrupted by Ctrl-C; the ones after it work."""
    forward, calls = Engine.forward, iter(range(1, 1000))

    def pass_or_interrupt(self: Engine, ids: Sequence[int], *, keep: int = 1) -> NDArray[Any]:
        if next(calls) == call:
            raise KeyboardInterrupt
        return forward(self, ids, keep=keep)

    monkeypatch.setattr(Engine, "forward", pass_or_interrupt)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, call=4)
    done = ok("chat", "small.run", "--max-tokens", "6", stdin="one\ntwo\n")
    assert " [stopped]\n" in done.err
    assert done.err.count("[cut: --max-tokens reached]") == 1
    assert done.out.endswith("\n")


@pytest.mark.parametrize("call", [1, 4])
def test_ctrl_c_in_a_run_leaves_a_clean_line(home: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    interrupt(monkeypatch, call=call)
    done = ek("run", "small.run", "The quick", "--max-tokens", "6")
    assert done.status == 130
    assert done.out.endswith("\n")
    assert done.err == "\nstopped\n"


def test_ctrl_c_in_a_long_command_leaves_nothing_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, call=2)
    assert ek("export", "small", "-o", tmp_path / "run").status == 130
    assert listing(tmp_path) == {}


def test_a_reader_that_goes_away_is_no_error(home: Path) -> None:
    code = "import sys; sys.argv[0] = 'edgekit'; from edgekit.cli.main import main; main()"
    for words in (["inspect", "small"], ["run", "small.run", "The"]):
        child = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        child.wait()
