"""DistilBERT in 8 bits, before and after: torch's dynamic quantisation, onnxruntime's, and edgekit's.

    python examples/distilbert_int8.py [FOLDER]

FOLDER is a DistilBERT model as transformers saves it, with a fast tokenizer. Without one, a model of DistilBERT's
sizes is made with random weights: its speed and size are those of the real one, its cosines only say how much rounding
moves a random function. Needs edgekit[compress].
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DistilBertConfig, DistilBertModel

from edgekit.bundle import MODEL, WEIGHTS
from edgekit.compress import compress
from edgekit.export.encoder import export_encoder
from edgekit.export.onnx_model import quantize_file
from edgekit.export.targets import find_target, host_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.embeddings import Encoder, EncoderSpec

THREADS, REPEATS = 2, 5
Run = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a DistilBERT model; default: random weights")
    given = parser.parse_args().folder
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as work:
        folder = given or random_model(Path(work) / "random")
        rows = contestants(folder, Path(work))
        ids = np.random.default_rng(0).integers(1000, 20000, (8, 64))
        print(f"DistilBERT ({'random weights' if given is None else given}), 8 texts of 64 tokens, {THREADS} threads\n")
        print("| | MB | ms | faster | lowest cosine with torch float32 |\n|---|--:|--:|--:|--:|")
        expected = rows[0][2](ids).mean(axis=1)
        slowest = 0.0
        for name, mb, run in rows:
            ms = median_ms(run, ids)
            slowest = slowest or ms
            print(f"| {name} | {mb:.1f} | {ms:.1f} | {slowest / ms:.2f}x | {lowest_cosine(expected, run(ids)):.4f} |")


def random_model(folder: Path) -> Path:
    """A DistilBERT of the published sizes; its tokenizer is MiniLM's, which has the same words."""
    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig(architectures=["DistilBertModel"])).save_pretrained(folder)
    tokenizer = fetch_builtin("minilm-l6") / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def contestants(folder: Path, work: Path) -> list[tuple[str, float, Run]]:
    """(name, megabytes, function from token ids to states), the baseline first."""
    model = DistilBertModel.from_pretrained(folder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will move to torchao
        dynamic = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    source, target = open_model(str(folder)), find_target(host_target())
    export_encoder(source, work / "float32", target=target)
    compress(source, load_recipe("encoder"), work / "small")
    export_encoder(open_model(str(work / "small")), work / "int8", target=target)
    quantize_file(work / "float32" / MODEL, work / "stock")
    return [
        ("torch float32", torch_mb(model, work), torch_run(model)),
        ("torch quantize_dynamic, int8", torch_mb(dynamic, work), torch_run(dynamic)),
        ("edgekit float32 (onnxruntime)", onnx_mb(work / "float32"), onnx_run(work / "float32")),
        ("onnxruntime dynamic int8 (edgekit compress model.onnx)", onnx_mb(work / "stock"), onnx_run(work / "stock")),
        ("edgekit int8 (recipe encoder)", onnx_mb(work / "int8"), onnx_run(work / "int8", operators="edgekit")),
    ]


def torch_mb(model: Any, work: Path) -> float:
    torch.save(model.state_dict(), work / "state")
    return (work / "state").stat().st_size / 1e6


def torch_run(model: Any) -> Run:
    def run(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            states: NDArray[np.float32] = model(torch.from_numpy(ids)).last_hidden_state.numpy()
        return states

    return run


def onnx_mb(folder: Path) -> float:
    return sum((folder / name).stat().st_size for name in (MODEL, WEIGHTS) if (folder / name).exists()) / 1e6


def onnx_run(folder: Path, *, operators: Any = "stock") -> Run:
    spec = EncoderSpec("DistilBertModel", "", 30522, 512, 768, "mean", False, 0, 0, operators)
    return Encoder(folder / MODEL, spec, threads=THREADS).run


def median_ms(run: Run, ids: NDArray[np.int64]) -> float:
    run(ids)
    taken = []
    for _ in range(REPEATS):
        clock = time.perf_counter()
        run(ids)
        taken.append(1e3 * (time.perf_counter() - clock))
    return float(np.median(taken))


def lowest_cosine(expected: NDArray[np.float32], states: NDArray[np.float32]) -> float:
    got = states.mean(axis=1)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(got, axis=1)
    return float((np.sum(expected * got, axis=1) / lengths).min())


if __name__ == "__main__":
    main()
