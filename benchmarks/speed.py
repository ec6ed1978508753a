"""Prefill and decode rates beside onnxruntime-genai and llama.cpp, in one run.

    edgekit int4             all matrices at 4 bits, symmetric, blocks of 32
    onnxruntime-genai int4   the same codes, through its own model builder (that they are the same is a check)
    llama.cpp Q4_0           its own rounding of the same source, every matrix of that type: its fastest
    edgekit lossless         the source file's own codes
    llama.cpp Q4_1           the source file

Each runs in a process of its own with 2 threads, and they take turns: 512 tokens of prompt, then 128 tokens of greedy
decoding from an empty cache. One turn each is discarded; medians of the others are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import safetensors.numpy
from common import Benchmark, arguments
from contestants import SILENT, Worker

from edgekit.bundle import WEIGHTS, Bundle
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.kernels.library import read_memory
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.sampling import Sampling
from edgekit.runtime.session import Session

PROMPT, ANSWER = 512, 128


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("speed")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, recipe in (("int4", str(RECIPE)), ("lossless", "lossless")):
            compress(open_model("smollm2-135m"), load_recipe(recipe), work / name)
            target = find_target(host_target())
            export(open_checkpoint(work / name), work / f"{name}.bundle", target=target, accept_drift=True)
        checkpoint = open_checkpoint(work / "int4")
        build_peer(checkpoint, work / "dense", work / "peer")
        quantize_peer(fetch_builtin("smollm2-135m"), work / "q4_0.gguf")
        bench.at_least(
            "share of equal codes, edgekit and onnxruntime-genai, %", equal_codes(checkpoint, work / "peer"), 100.0
        )
        compare(bench, work, repetitions=5 if options.quick else 9)
        python_share(bench, Session.open(work / "int4.bundle"))
        build_library(bench, work / "build")
    bench.finish(as_json=options.json)


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "benchmarks" / "recipes" / "int4-symmetric.toml"


def build_peer(checkpoint: Checkpoint, dense: Path, output: Path) -> None:
    """Save the checkpoint's values as a transformers folder and let genai's builder quantise it."""
    dense.mkdir()
    tensors = {}
    for matrices, vectors in checkpoint.blocks.values():
        tensors.update({f"{module}.weight": checkpoint.weight(module).dense() for module in matrices})
        tensors.update({name: checkpoint.vector(name) for name in vectors})
    safetensors.numpy.save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text(json.dumps(checkpoint.config))
    for name, content in checkpoint.assets.items():
        (dense / name).write_bytes(content)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(dense), "-o", str(output)]
    settings = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    done = subprocess.run([*builder, *settings], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"onnxruntime-genai's builder failed:\n{done.stderr[-2000:]}")


def equal_codes(checkpoint: Checkpoint, peer: Path) -> float:
    """Percentage of codes that are the same in the peer's file and in ours, over the MLPs, outputs and the head."""
    names = {"model.embed_tokens": "lm_head.MatMul.weight_Q4"}
    for index in range(checkpoint.decoder.layers):
        for module, short in (("self_attn.o_proj", "attn.o_proj"), *((f"mlp.{m}", f"mlp.{m}") for m in MLP)):
            names[f"model.layers.{index}.{module}"] = f"model.layers.{index}.{short}.MatMul.weight_Q4"
    stored = {tensor.name: tensor for tensor in onnx.load(peer / "model.onnx").graph.initializer}
    equal = total = 0
    for module, name in names.items():
        theirs, ours = onnx.numpy_helper.to_array(stored[name]), checkpoint.weight(module).codes
        equal += int((((theirs ^ ours) & 15) == 0).sum() + (((theirs ^ ours) >> 4) == 0).sum())
        total += 2 * ours.size
    return 100 * equal / total


MLP = ("gate_proj", "up_proj", "down_proj")


def compare(bench: Benchmark, work: Path, *, repetitions: int) -> None:
    """All contestants take turns; one turn each is discarded."""
    workers = {
        "edgekit int4": Worker("edgekit", work / "int4.bundle"),
        "edgekit lossless": Worker("edgekit", work / "lossless.bundle"),
        "onnxruntime-genai int4": Worker("onnxruntime-genai", work / "peer"),
        "llama.cpp Q4_1": Worker("llama.cpp", fetch_builtin("smollm2-135m")),
        "llama.cpp Q4_0": Worker("llama.cpp", work / "q4_0.gguf"),
    }
    rates: dict[str, list[float]] = {}
    reads: list[float] = []
    for repetition in range(repetitions + 1):
        for name, worker in workers.items():
            turn = {
                f"prefill {PROMPT}, {name}": worker.prefill(PROMPT, repetition),
                f"decode {ANSWER}, {name}": worker.decode(ANSWER, repetition),
            }
            for test, rate in turn.items() if repetition else ():
                rates.setdefault(test, []).append(rate)
        reads.append(read_rate())
    for worker in workers.values():
        worker.close()
    found = {test: bench.samples(test, values, unit="tok/s") for test, values in sorted(rates.items())}
    for name, worker in workers.items():
        bench.value(f"open and first token of {PROMPT}, {name}", worker.cold, "ms")
        bench.value(f"private memory after load, {name}", worker.private_mb, "MB")
    hold(bench, work, found, workers, bench.samples("plain reading loop, 2 threads", reads[1:], unit="GB/s"))


def hold(bench: Benchmark, work: Path, found: dict[str, float], workers: dict[str, Worker], read_gbs: float) -> None:
    """Every bound, as one check."""
    for ours, theirs, prefill, decode in BOUNDS:
        for test, bound in ((f"prefill {PROMPT}", prefill), (f"decode {ANSWER}", decode)):
            bench.at_least(
                f"{test}: {ours} over {theirs}", found[f"{test}, {ours}"] / found[f"{test}, {theirs}"], bound
            )
    weights = (work / "int4.bundle" / WEIGHTS).stat().st_size
    rate = weights * found[f"decode {ANSWER}, edgekit int4"] / 1e9
    bench.value("weights read while decoding, edgekit int4", rate, "GB/s")
    bench.at_least("decode, edgekit int4: share of the reading loop's rate, %", 100 * rate / read_gbs, 70.0)
    ours, theirs = workers["edgekit lossless"], workers["llama.cpp Q4_1"]
    bench.at_most("open and first token: edgekit lossless over llama.cpp Q4_1", ours.cold / theirs.cold, 1.0)
    spec = Bundle.open(work / "lossless.bundle").spec
    allowed = spec.cache_bytes(1024) + 1024 * spec.activation_bytes + spec.resident_bytes / 10
    bench.at_most(
        "private memory after load over cache, activations and a tenth of the weights",
        ours.private_mb * 1e6 / allowed,
        1.0,
    )


# ours, theirs, and the least ratio of prefill and decode rates
BOUNDS = (
    ("edgekit int4", "onnxruntime-genai int4", 1.0, 1.0),
    ("edgekit lossless", "llama.cpp Q4_1", 3.0, 2.1),
    ("edgekit int4", "llama.cpp Q4_0", 1.2, 1.5),
)


def read_rate() -> float:
    """Gigabytes a second that two threads read from memory in a plain loop, the best of three."""
    data = np.ones(1 << 28, np.uint8)
    best = 0.0
    for _ in range(3):
        threads = [Thread(target=read_memory, args=(half,)) for half in np.split(data, 2)]
        clock = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, data.nbytes / (time.perf_counter() - clock) / 1e9)
    return best


def build_library(bench: Benchmark, folder: Path) -> None:
    """The kernels built as `pip install` builds them, on two cores: seconds and bytes."""
    clock = time.perf_counter()
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder)],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command[:2]} failed:\n{done.stderr[-2000:]}")
    bench.at_most("kernel library, built on two cores, s", time.perf_counter() - clock, 90.0)
    size = (folder / "_edgekit_kernels.so").stat().st_size
    bench.at_most("kernel library, MB", size / 1e6, 2.0)


def quantize_peer(source: Path, target: Path) -> None:
    """llama.cpp's own Q4_0 of the same file, every matrix of that type."""
    import llama_cpp

    llama_cpp.llama_log_set(SILENT, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.pure, parameters.allow_requantize = True, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        sys.exit("llama.cpp could not quantise the model")


def python_share(bench: Benchmark, session: Session) -> None:
    """Time of a decode step outside onnxruntime, in the loop that users run: sampling, text, bookkeeping."""
    ways = {"greedy": Sampling(), "top-p 0.9": Sampling(temperature=0.8, top_p=0.9, seed=0)}
    for name, sampling in ways.items():
        share = share_of_python(bench, session, name, sampling)
        bench.at_most(f"python's share of a decode step, {name}, %", share, 5.0)


def share_of_python(bench: Benchmark, session: Session, name: str, sampling: Sampling) -> float:
    shares = []
    for story in range(5):
        answer = session.generate(f"Story {story}: Once upon a time", max_tokens=ANSWER, sampling=sampling)
        session.engine.run_seconds = 0.0
        answer.text()
        decode = sum(answer.timing.gaps)
        inside = session.engine.run_seconds - answer.timing.prefill
        shares.append(100 * (decode - inside) / decode)
    return bench.samples(f"python's share of a decode step, {name}", shares, unit="%")


if __name__ == "__main__":
    main()
