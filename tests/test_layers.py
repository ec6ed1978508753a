"""Who may import whom (DESIGN.md, section 2): from the source by its syntax, and in interpreters that lack packages."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from test_reference import rounded, tiny_checkpoint
from tiny import tiny_folder

from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.quant.grid import Grid

ROOT = Path(__file__).parent.parent / "edgekit"
HEAVY = {
    *("torch", "transformers", "optimum", "tensorly"),
    *("onnx", "onnxscript", "onnx_ir", "safetensors", "gguf", "ml_dtypes", "huggingface_hub"),
}


@dataclass(frozen=True)
class Layer:
    """Modules (by the prefixes of their names), the layers below that they may import, and the packages."""

    modules: str
    below: str
    packages: str = ""


LAYERS = {
    # light: what runs, measures and serves a bundle
    "core": Layer("__init__ errors folder schema manifest report device host", "", "rich"),
    "bundle": Layer("bundle", "core", "numpy"),
    "heatmap": Layer("heatmap", "core", "numpy matplotlib"),
    "weight": Layer("weight cache_rows", "core", "numpy"),
    "kernels": Layer("kernels", "core bundle weight", "numpy onnxruntime"),
    "profile": Layer("profile", "core bundle kernels runtime", "numpy onnxruntime tokenizers"),
    "runtime": Layer("runtime", "core bundle weight kernels profile", "numpy onnxruntime tokenizers jinja2"),
    "assistant": Layer(
        "assistant",
        "core bundle weight kernels profile runtime",
        "numpy tokenizers sqlite_vec pypdf llguidance starlette uvicorn",
    ),
    # convert: what makes a bundle, without torch
    "functions": Layer("kernels.functions", "core kernels", "onnx"),
    "config": Layer("model.config model.rope model.encoder_config", "core", "numpy"),
    "checkpoint": Layer("checkpoint", "core weight config", "numpy safetensors ml_dtypes"),
    "model": Layer("model", "core weight config checkpoint", "numpy gguf tokenizers huggingface_hub"),
    "step": Layer("step recipe", "core weight config checkpoint", "numpy"),
    "quant": Layer("quant", "core weight config checkpoint model step sensitivity", "numpy"),
    "compress": Layer(
        "compress job forecast journal",
        "core weight config checkpoint step calibrate passes",
        "psutil safetensors torch",
    ),
    # compress: what needs activations; the layers above import it late
    "calibration": Layer(
        "model.torch_view model.windows model.calibration",
        "core weight config checkpoint model step",
        "numpy torch tokenizers",
    ),
    "passes": Layer("passes", "core weight config checkpoint model step heal", ""),
    "calibrate": Layer("calibrate", "core weight config checkpoint model step calibration", "numpy psutil safetensors"),
    "sensitivity": Layer(
        "quant.sensitivity",
        "core weight config checkpoint model step calibration calibrate quant",
        "numpy torch",
    ),
    "structure": Layer(
        "prune merge",
        "core heatmap weight config checkpoint model step calibration calibrate sensitivity quant",
        "numpy scipy psutil",
    ),
    "tn": Layer(
        "tn",
        "core heatmap weight config checkpoint model step calibration calibrate sensitivity quant",
        "numpy tensorly psutil",
    ),
    "search": Layer(
        "compose search search_plot",
        "core weight config checkpoint model step calibration calibrate sensitivity quant structure tn compress",
        "numpy psutil optuna torch",
    ),
    "card": Layer("card", "core", "huggingface_hub"),
    "export": Layer(
        "export",
        "card core bundle weight kernels functions config checkpoint model quant tn runtime",
        "numpy onnx onnxruntime tokenizers",
    ),
    "heal": Layer(
        "heal",
        "core weight config checkpoint model step calibration quant compress evaluate runtime",
        "numpy torch safetensors tokenizers rich",
    ),
    # on top
    "account": Layer("account", "core"),
    "reproduce": Layer("reproduce", "card core bundle weight config checkpoint model step compress export"),
    "deploy": Layer("deploy", "core bundle runtime", "numpy cryptography"),
    "lm-eval": Layer("evaluate.harness", "core evaluate weight", "lm_eval"),
    "evaluate": Layer("evaluate", "core bundle weight runtime export model", "numpy tokenizers"),
    "cli": Layer(
        "cli",
        "core bundle weight kernels profile runtime config checkpoint model step compress export evaluate heal"
        " tn structure search card deploy account reproduce assistant",
        "click rich starlette uvicorn",
    ),
}
LIGHT = ("core", "bundle", "weight", "kernels", "profile", "runtime", "assistant")


@dataclass(frozen=True)
class Import:
    """`name` is imported on a line; `late` when inside a function."""

    name: str
    line: int
    late: bool


def module_name(path: Path) -> str:
    """edgekit/export/graph.py -> export.graph; the package's own file -> __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(path: Path) -> list[Import]:
    """Every import of a file that runs, wherever it stands; what is under `if TYPE_CHECKING` never does."""

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} must name the whole module"
                base = child.module or ""
                inner = [f"{base}.{alias.name}" for alias in child.names]
                known = [name for name in inner if name.removeprefix("edgekit.") in modules()]
                yield from (Import(name, child.lineno, late) for name in (known or [base]))
            else:
                yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return list(walk(ast.parse(path.read_text()), late=False))


def layer_of(module: str) -> str:
    """The layer with the longest prefix of the module's name."""
    found = [
        (len(prefix), name)
        for name, layer in LAYERS.items()
        for prefix in layer.modules.split()
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert found, f"edgekit.{module} must belong to a layer: add it to LAYERS, and to DESIGN.md if it is a new one"
    return max(found)[1]


@pytest.mark.parametrize("module", modules())
def test_modules_import_only_what_their_layer_may(module: str) -> None:
    own = layer_of(module)
    allowed = {own, *LAYERS[own].below.split()}
    packages = {*LAYERS[own].packages.split(), *sys.stdlib_module_names}
    for found in imports(modules()[module]):
        where = f"edgekit.{module}, line {found.line}, of layer {own}"
        top, _, inner = found.name.partition(".")
        if top == "edgekit":
            assert layer_of(inner or "__init__") in allowed, f"{where} may not import {found.name}"
        else:
            assert top in packages, f"{where} may not import the package {top}"


def test_the_table_names_only_what_exists() -> None:
    for layer in LAYERS.values():
        assert set(layer.below.split()) <= LAYERS.keys()
        for prefix in layer.modules.split():
            assert any(m == prefix or m.startswith(prefix + ".") for m in modules()), f"there is no edgekit.{prefix}"


def test_light_layers_stand_on_light_layers_and_packages() -> None:
    for name in LIGHT:
        assert set(LAYERS[name].below.split()) <= set(LIGHT)
        assert not HEAVY & set(LAYERS[name].packages.split())


def test_nothing_imports_the_command_line() -> None:
    assert all("cli" not in layer.below.split() for layer in LAYERS.values())


def test_imports_at_the_top_make_no_circle() -> None:
    graph = {
        module: {
            found.name.partition(".")[2] or "__init__"
            for found in imports(path)
            if found.name.startswith("edgekit") and not found.late
        }
        for module, path in modules().items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


# --- interpreters that lack packages ----------------------------------------------------------------------------------

BLOCK = """
import importlib.abc, socket, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

def no_network(*args, **options):
    raise OSError("the network is cut")

sys.meta_path.insert(0, Blocked())
socket.socket.connect = socket.getaddrinfo = no_network
"""


def run_without(blocked: set[str], code: str, *arguments: Path) -> str:
    """Run `code` in a new interpreter in which `blocked` cannot be imported and no connection be made; its output."""
    script = BLOCK.format(blocked=sorted(blocked)) + code
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_blocks() -> None:
    code = "import onnx"
    with pytest.raises(AssertionError, match="onnx is blocked"):
        run_without(HEAVY, code)


def test_a_bundle_runs_with_the_light_install(tmp_path: Path) -> None:
    checkpoint = rounded(tiny_checkpoint(), Grid(4, 32, "symmetric"))
    export(checkpoint, tmp_path / "bundle", target=TARGETS["portable"])
    code = """
import sys
from edgekit.runtime.session import Session

session = Session.open(sys.argv[1], threads=1)
answer = session.generate([{"role": "user", "content": "Hello"}], max_tokens=5)
answer.text()
print(*answer.tokens)
"""
    tokens = run_without(HEAVY, code, tmp_path / "bundle")
    assert len(tokens.split()) == 5 or tokens.split()[-1] == "2"


def test_compress_and_export_need_no_torch(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    code = """
import sys
from pathlib import Path

from edgekit.compress import compress
from edgekit.export.export import export
from edgekit.export.targets import find_target
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe

folder = Path(sys.argv[1])
compress(open_model(str(folder / "model")), load_recipe("int4"), folder / "small")
manifest = export(open_model(str(folder / "small")), folder / "bundle", target=find_target("x86"))
print(manifest.steps[0].step, manifest.recipe)
"""
    assert run_without({"torch", "transformers"}, code, tmp_path) == "quant.int4 int4\n"
    assert (tmp_path / "bundle" / "model.onnx").is_file()


def test_help_loads_click_and_the_core_only() -> None:
    code = """
import sys
before = set(sys.modules)
from edgekit.cli.main import cli
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
print(*(name for name in sys.modules if name.startswith("edgekit.")))
"""
    packages, ours = run_without(HEAVY, code).splitlines()
    assert set(packages.split()) == {"edgekit", "click"}
    assert {layer_of(name.removeprefix("edgekit.")) for name in ours.split()} == {"core", "cli"}


def test_onnxruntime_keeps_no_record_of_what_runs(tmp_path: Path) -> None:
    code = "import edgekit.runtime.engine, onnxruntime as ort; ort.get_available_providers()"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
