"""Bad input: one line on stderr, the exit status of its kind, nothing half-written, and no traceback."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, ek, listing, ok
from test_bundle import seal
from tiny import tiny_folder, tiny_gguf

from edgekit.runtime import sandbox


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf, the transformers folder `plain`, the checkpoint `small`, the bundle `run`, and files to trip over."""
    home = tmp_path_factory.mktemp("home")
    tiny_gguf(home / "tiny.gguf")
    tiny_folder(home / "plain")
    ok("compress", home / "tiny.gguf", "-o", home / "small")
    ok("export", home / "small", "-o", home / "run", "--target", "portable")
    (home / "foreign").mkdir()
    (home / "foreign" / "thesis.txt").write_text("do not delete")
    (home / "short.txt").write_text("too short")
    (home / "latin1.txt").write_bytes(b"gr\xfc\xdfe")
    (home / "book.txt").write_text("The quick brown fox. " * 20)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder, to be damaged."""
    folder = tmp_path / "home"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def fails(words: str | list[str], status: int, pattern: str, *, stdin: str | bytes = "") -> Done:
    """`edgekit WORDS` must say `pattern` in one line on stderr, end with `status`, and leave the folder as it is."""
    before = listing(Path())
    done = ek(*(words.split() if isinstance(words, str) else words), stdin=stdin)
    assert re.fullmatch(r"error: [^\n]*\n", done.err), done.err
    assert re.search(pattern, done.err), done.err
    assert (done.status, done.out) == (status, "")
    assert listing(Path()) == before
    return done


# --- what the user asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "pattern"),
    [
        # names
        ("compres tiny.gguf", 2, "no command is called 'compres'; did you mean 'compress'"),
        ("frobnicate", 2, "no command is called 'frobnicate'; known are account, assistant, card"),
        ("devices sow", 2, "no command is called 'sow'; did you mean 'show'"),
        ("devices show pi9", 2, "no device is called 'pi9'; did you mean 'pi5'"),
        ("compress tiny.gguf -o new -r int5", 2, "got 'int5'; did you mean 'int"),
        ("export small -o new --target x87", 2, "got 'x87'; did you mean 'x86'"),
        ("export small -o new --device pi9", 2, "no device is called 'pi9'; did you mean 'pi5'"),
        ("run run hello --tempratur 1", 2, "no such option '--tempratur'.*; see edgekit run --help"),
        ("run run", 2, "missing argument 'PROMPT'; see edgekit run --help"),
        ("run run hello --seed soon", 2, "'--seed': 'soon' is not a valid integer; see edgekit run --help"),
        # files that are not there, or something else
        ("compress absent.gguf -o new", 2, "there is no file or folder 'absent.gguf'"),
        ("compress smollm-135m -o new", 2, "got 'smollm-135m'; did you mean 'smollm2-135m'"),
        ("compress smollm2-135m -o new --offline", 2, "smollm2-135m must be in the cache"),
        ("compress book.txt -o new", 2, "a model file must be .gguf: got book.txt"),
        ("compress foreign -o new", 3, "must hold config.json or edgekit.json: foreign has neither"),
        ("compress tiny.gguf -o new -r absent.toml", 2, "got 'absent.toml'"),
        ("inspect absent", 2, "got 'absent'"),
        ("export run -o new", 3, "run is a bundle, not a checkpoint"),
        ("run absent hello", 2, "a bundle must be a folder: absent"),
        ("run tiny.gguf hello", 2, "a bundle must be a folder: tiny.gguf"),
        ("run small hello", 2, "small is a checkpoint.*edgekit export small"),
        ("run foreign hello", 3, "must hold edgekit.json: foreign"),
        ("chat plain", 3, "must hold edgekit.json: plain"),
        ("profile small", 2, "small is a checkpoint.*edgekit export small"),
        ("compare absent.json absent.json", 2, "a report must be a readable file: absent.json"),
        ("compare book.txt book.txt", 3, "book.txt must be JSON"),
        # outputs
        ("compress tiny.gguf", 2, "name it with -o, or pass --dry-run"),
        ("export small", 2, "missing option '-o'"),
        ("compress tiny.gguf -o run", 2, "the output must not exist: .*run; choose another name or pass --force"),
        ("export small -o run", 2, "the output must not exist: .*run; choose another name or pass --force"),
        ("compress tiny.gguf -o foreign --force", 2, "replaces only folders that edgekit wrote: .*foreign"),
        ("export small -o foreign --force", 2, "replaces only folders that edgekit wrote: .*foreign"),
        ("compress tiny.gguf -o tiny.gguf --force", 2, "tiny.gguf"),
        ("compress plain -o plain --force", 2, "the output must lie apart from the source"),
        ("compress small -o small --force", 2, "the output must lie apart from the source"),
        ("compress small -o small/inside", 2, "the output must lie apart from the source"),
        ("compress tiny.gguf -o book.txt/new", 2, "the output must be writable: .*book.txt/new"),
        ("export small -o book.txt/new", 2, "the output must be writable: .*book.txt/new"),
        ("compress tiny.gguf -o /proc/new", 2, "the output must be writable: /proc/new"),
        ("export small -o /proc/new", 2, "the output must be writable: /proc/new"),
        # numbers
        ("export small -o new --context 0", 2, "--context must be from 1 to the model's 256: got 0"),
        ("export small -o new --context 257", 2, "--context must be from 1 to the model's 256: got 257"),
        ("run run hello --context 0", 2, "--context must be from 1 to the bundle's 256: got 0"),
        ("run run hello --context -4", 2, "got -4"),
        ("run run hello --context 300", 2, "got 300"),
        ("run run hello --threads 0", 2, "--threads must be at least 1: got 0"),
        ("run run hello --max-tokens 0", 2, "--max-tokens must be at least 1: got 0"),
        ("run run hello --max-tokens -1", 2, "got -1"),
        ("run run hello --temperature -0.5", 2, "temperature must be at least 0 .*got -0.5"),
        ("run run hello --temperature nan", 2, "temperature .*got nan"),
        ("run run hello --top-p 0", 2, "top_p must be above 0"),
        ("run run hello --top-k -1", 2, "top_k must be at least 0"),
        ("run run hello --seed -1", 2, "seed must be at least 0"),
        ("chat run --min-p 2", 2, "min_p must be from 0"),
        ("profile run --prompt 0", 2, "--prompt must be at least 1: got 0"),
        ("profile run --generate -3", 2, "--generate must be at least 1: got -3"),
        ("profile run --repeat 0", 2, "--repeat must be at least 1: got 0"),
        ("profile run --prompt 512", 2, "each be below the context of 256 tokens: got 512 and 64"),
        ("profile run --depths 250", 2, "--depths must leave room for 32 tokens in the context of 256: got 250"),
        ("profile run --power rapt", 2, "--power must be auto.*did you mean 'rapl'"),
        ("profile run -o report.pdf", 2, "-o must end in .json, .csv, .md, .html: got report.pdf"),
        ("profile run --depths many", 2, "--depths must be numbers with commas"),
        ("profile run --dim height=3", 2, "--dim is for ONNX files"),
        ("compare run absent.json", 2, "compare takes reports or bundles, not both"),
        ("eval run --text book.txt --window 3", 2, "--window must be from 4 to the context of 256 tokens: got 3"),
        ("eval run --text book.txt", 2, "--window must be from 4 to the context of 256 tokens: got 1024"),
        ("eval run --text book.txt --window 16 --windows 0", 2, "--windows must be at least 1: got 0"),
        ("eval run --choices book.txt --limit 0", 2, "--limit must be at least 1: got 0"),
        ("eval run --text book.txt --window 16 --context -1", 2, "--context must be from 1 .*got -1"),
        # texts
        ("eval run", 2, "pass --text FILE, --choices FILE or --safety"),
        ("eval run --text absent.txt", 2, r"a file must be readable: absent.txt \(No such file"),
        ("eval run --text foreign", 2, "a file must be readable: foreign"),
        ("eval run --text latin1.txt", 2, "a text must be UTF-8: latin1.txt has .* at byte 2"),
        ("eval run --text /dev/null --window 8", 2, "must fill one window of 8 tokens: it has 0"),
        ("eval run --text short.txt --window 64", 2, r"must fill one window of 64 tokens: it has \d;? .*--window"),
        ("eval run --choices book.txt", 2, "book.txt:1 must be a JSON object"),
        ("eval run --choices /dev/null", 2, "/dev/null must hold at least one item"),
        ("eval absent --choices book.txt", 2, "a model must exist or be known: got 'absent'"),
    ],
)
def test_requests_that_are_wrong(
    words: str, status: int, pattern: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(home / "cache"))
    fails(words, status, pattern)


def test_export_does_not_replace_its_own_source(home: Path) -> None:
    fails("export small -o small --force", 2, "the output must lie apart from the source")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["run", "run", ""], "the prompt must not be empty"),
        (["run", "run", "", "--raw"], "the prompt must not be empty"),
        (["run", "run", "", "--system", "be brief"], "the prompt must not be empty"),
        (["run", "run", "hello", "--stop", ""], "a stop string must not be empty"),
        (["inspect", ""], "a model must exist"),
        (["inspect", "x" * 5000], "a model must exist or be known"),
        (["eval", "x" * 5000, "--text", "book.txt"], "a model must exist or be known"),
        (["run", "x" * 5000, "hello"], "(?i)too long|must be a folder"),
        (["compress", "tiny.gguf", "-o", "x" * 5000], "must be writable: .*too long"),
        (["run", "run", "hello\x1b[2J", "--context", "1"], "the prompt must fit"),
        (["devices", "show", "\x1b[31mpi\n5"], "no device is called"),
    ],
)
def test_words_that_are_wrong(words: list[str], pattern: str, home: Path) -> None:
    done = fails(words, 4 if "must fit" in pattern else 2, pattern)
    assert "\x1b" not in done.err


def test_a_prompt_longer_than_the_context_names_both_numbers(home: Path) -> None:
    fails(["run", "run", "word " * 300, "--raw"], 4, r"fit in the context: \d{3,4} tokens, limit 256")
    fails(["run", "run", "word " * 30, "--raw", "--context", "16"], 4, r"fit in the context: \d{2,3} tokens, limit 16 ")


def test_standard_input_that_is_no_text(home: Path) -> None:
    fails("run run -", 2, "a prompt must be UTF-8: .* at byte 1", stdin=b"a\xff")
    fails("run run -", 2, "the prompt must not be empty")
    done = ek("chat", "run", stdin=b"a\xff\n")
    assert (done.status, "a message must be UTF-8" in done.err, "Traceback" in done.err) == (2, True, False)


@pytest.mark.parametrize(
    ("recipe", "pattern"),
    [
        (
            'name = "a"\ndescripton = "b"\n[[step]]\nuse = "quant.int4"\n',
            "unknown key 'descripton'; did you mean 'desc",
        ),
        (
            'name = "a"\n[[step]]\nuse = "quant.int4"\nblok = 32\n',
            r"step\[0\].*unknown key 'blok'; did you mean 'block'",
        ),
        ('name = "a"\n[[step]]\nuse = "quant.int5"\n', r"step\[0\].*quant.int5"),
        ('name = "a"\n[[step]]\nuse = "quant.int4"\nblock = 48\n', "block must be one of 32, 64, 128: got 48"),
        ('name = "a"\n', "must have at least one"),
        ("name = ", "must be a readable TOML file"),
    ],
)
def test_recipes_that_are_wrong(recipe: str, pattern: str, home: Path) -> None:
    (home / "mine.toml").write_text(recipe)
    assert "mine.toml" in fails("compress tiny.gguf -o new -r mine.toml", 2, pattern).err


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("{", ":2 must be a JSON object"),
        ("[1]", r":2 must be a JSON object: got \[1\]"),
        ("[" * 100_000, ":2 must be a JSON object"),
        ('{"context": "a", "choices": ["b"]}', ":2: the key 'answer' is missing"),
        ('{"context": "a", "choices": ["b"], "answer": 1}', ":2: the answer must be an index of its 1 choices: got 1"),
        ('{"context": "a", "choices": [], "answer": 0}', ":2: the answer must be an index of its 0 choices"),
        ('{"context": "a", "choices": ["b", 1], "answer": 0}', r":2: choices\[1\] must be a string"),
        ('{"context": "a", "choices": ["b"], "answer": true}', ":2: answer must be an integer"),
        (
            '{"context": "", "choices": ["b", "c"], "answer": 0, "contexts": ["d"], "continuation": "e"}',
            ":2: contexts must be one for each of the 2 choices: got 1",
        ),
    ],
)
def test_questions_that_are_wrong_are_named_by_their_line(line: str, pattern: str, home: Path) -> None:
    good = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0})
    (home / "q.jsonl").write_text(f"{good}\n{line}\n")
    fails("eval run --choices q.jsonl", 2, f"q.jsonl{pattern}")


@pytest.mark.parametrize("option", ["--text", "--choices"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_gz_files_that_are_damaged(option: str, damage: str, home: Path) -> None:
    data = bytearray(gzip.compress(b"The quick brown fox. " * 50, mtime=0))
    data[20] ^= 0xFF if damage == "flipped" else 0
    content = {"cut": bytes(data[:30]), "flipped": bytes(data), "plain": b"no gzip"}[damage]
    (home / "a.gz").write_bytes(content)
    fails(["eval", "run", option, "a.gz", "--window", "8"], 2, "a.gz")


# --- what lies on disk ------------------------------------------------------------------------------------------------


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.9, 0.999])
def test_a_truncated_gguf(keep: float, home: Path) -> None:
    cut(home / "tiny.gguf", keep)
    fails("compress tiny.gguf -o new", 3, "tiny.gguf")
    fails("inspect tiny.gguf", 3, "tiny.gguf")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.9, 0.999])
def test_truncated_safetensors(keep: float, home: Path) -> None:
    cut(home / "plain" / "model.safetensors", keep)
    fails("compress plain -o new", 3, "model.safetensors")
    fails("export plain -o new", 3, "model.safetensors")
    cut(next((home / "small").glob("*.safetensors")), keep)
    fails("export small -o new", 3, r"small/.*\.safetensors differs from its digest")


def test_architectures_that_are_not_supported_and_those_that_are(home: Path) -> None:
    config = home / "plain" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["MambaForCausalLM"]}))
    pattern = "LlamaForCausalLM, MistralForCausalLM, Qwen2.*MambaForCausalLM"
    fails("compress plain -o new", 3, pattern)
    fails("export plain -o new", 3, pattern)
    tiny_gguf(home / "mamba.gguf", metadata={"general.architecture": "mamba"})
    fails("compress mamba.gguf -o new", 3, "mamba")


@dataclass(frozen=True)
class Damage:
    """Something done to the bundle, and what every command that opens it must say."""

    do: Callable[[Path], object]
    pattern: str
    status: int = 3


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def do(bundle: Path) -> None:
        data = json.loads((bundle / name).read_text())
        change(data)
        (bundle / name).write_text(json.dumps(data))

    return do


def escape(to: str) -> Callable[[Path], None]:
    return edit("edgekit.json", lambda data: data["files"].update({to: data["files"].pop("tokenizer.json")}))


DAMAGES = {
    "changed": Damage(
        lambda b: (b / "model.onnx.data").write_bytes(b"x" * 9), "model.onnx.data differs from its digest"
    ),
    "lacking": Damage(lambda b: (b / "tokenizer.json").unlink(), "run lacks tokenizer.json"),
    "newer": Damage(edit("edgekit.json", lambda data: data.update(schema=2)), "has schema 2, .*; update edgekit"),
    "foreign": Damage(edit("edgekit.json", lambda data: data.update(colour="red")), "unknown key 'colour'"),
    "no json": Damage(lambda b: (b / "edgekit.json").write_text("{"), "must be readable JSON"),
    "parent": Damage(escape("../tiny.gguf"), "must stay inside its folder: got '../tiny.gguf'"),
    "absolute": Damage(escape("/etc/passwd"), "must stay inside its folder: got '/etc/passwd'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bundles_that_are_damaged_or_hostile(name: str, home: Path) -> None:
    damage = DAMAGES[name]
    damage.do(home / "run")
    for words in ("run run hello", "chat run", "profile run", "inspect run", "eval run --text book.txt"):
        fails(words, damage.status, damage.pattern)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for message in messages %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_chat_templates_that_loop_or_reach_out(source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    (home / "run" / "chat_template.jinja").write_text(source)
    fails("run run hello", 3, "differs from its digest")
    seal(home / "run")
    before = listing(home)
    fails("run run hello", 3, "template")
    assert listing(home) == before
    done = ek("chat", "run", stdin="hello\n")
    assert (done.status, "Traceback" in done.err, done.err.count("error: ")) == (3, False, 1)


def test_a_template_may_refuse_a_conversation_in_its_own_words(home: Path) -> None:
    (home / "run" / "chat_template.jinja").write_text("{{ raise_exception('roles must\n alternate\x1b[2J') }}")
    seal(home / "run")
    assert "\x1b" not in fails("run run hello", 2, "roles must alternate").err


@pytest.mark.parametrize("command", ["run run hello", "chat run", "eval run --text book.txt --window 8"])
def test_a_model_that_does_not_fit_in_memory(command: str, home: Path) -> None:
    edit("runtime.json", lambda data: data.update(resident_bytes=10**15))(home / "run")
    seal(home / "run")
    fails(command, 4, r"must fit in memory: it needs [\d,]+ MB .*are available")


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status", "pattern"),
    [
        (errno.ENOSPC, 4, "the disk is full"),
        (errno.EROFS, 2, "must be writable: .*Read-only"),
        (errno.EIO, 2, "refused"),
    ],
)
@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("compress tiny.gguf -o new", "edgekit.compress.sync"),
        ("compress tiny.gguf -o run --force", "edgekit.folder.sync"),
        ("export small -o new", "edgekit.folder.sync"),
        ("export small -o run --force", "edgekit.folder.sync"),
        ("export small -o new", "edgekit.manifest.write_file"),
    ],
)
def test_a_disk_that_fails(
    words: str, where: str, number: int, status: int, pattern: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *rest: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(where, fail)
    before = (home / "run" / "edgekit.json").read_bytes()
    done = ek(*words.split())
    assert done.status == status, done.err
    assert re.fullmatch(rf"error: [^\n]*{pattern}[^\n]*\n", done.err), done.err
    assert (home / "run" / "edgekit.json").read_bytes() == before
    assert not (home / "new").exists()
    kept_for_resume = {path for path in home.iterdir() if path.name.startswith(".")}
    assert words.startswith("compress") or not kept_for_resume


def test_what_compress_left_on_a_full_disk_can_be_resumed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as full:
        full.setattr("edgekit.folder.sync", fail)
        assert ek("compress", "tiny.gguf", "-o", "new").status == 4
    ok("compress", "tiny.gguf", "-o", "new", "--resume")
    assert "15 matrices" in ok("inspect", "new").out


# --- our own mistakes -------------------------------------------------------------------------------------------------


def boom(problem: BaseException) -> Callable[..., Any]:
    def raise_it(*words: object, **options: object) -> None:
        raise problem

    return raise_it


def test_a_bug_is_one_line_that_asks_for_a_report(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.model.sources.open_model", boom(ZeroDivisionError("division\nby zero")))
    done = ek("inspect", "small")
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(
        r"internal error: ZeroDivisionError: division by zero; [^\n]*--debug[^\n]*report[^\n]*\n", done.err
    )


@pytest.mark.parametrize(
    ("problem", "status", "pattern"),
    [
        (MemoryError(), 4, "memory ran out; close"),
        (MemoryError("Unable to allocate 3 GiB"), 4, r"memory ran out \(Unable to allocate 3 GiB\)"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "refused: Permission denied: /root/x"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "refused: No space left on device\n"),
        (OSError("strange"), 2, "refused: strange"),
    ],
)
def test_what_the_library_did_not_foresee(
    problem: Exception, status: int, pattern: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.model.sources.open_model", boom(problem))
    fails("inspect small", status, pattern)


@pytest.mark.parametrize("words", ["--debug inspect absent", "inspect --debug absent", "inspect absent --debug"])
def test_debug_shows_the_traceback_wherever_it_stands(words: str, home: Path) -> None:
    done = ek(*words.split())
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: a model must exist")


def test_debug_of_a_bug(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.model.sources.open_model", boom(ZeroDivisionError("no")))
    done = ek("inspect", "small", "--debug")
    assert done.status == 1
    assert "ZeroDivisionError: no\n" in done.err
    assert done.err.splitlines()[-1].startswith("internal error: ZeroDivisionError: no; ")
