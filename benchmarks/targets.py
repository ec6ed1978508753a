"""Bundles for other machines, proved here: instructions per token on an emulated Arm core beside llama.cpp's, and what
the graphs for NPUs compute beside the NumPy forward.

    python benchmarks/targets.py --only arm       after `make test-arm`, whose folder it uses (--work)
    python benchmarks/targets.py --only qnn       onnxruntime-qnn: compiled, and run as a Hexagon would
    python benchmarks/targets.py --only openvino  onnxruntime-ep-openvino, on its CPU device

Counts and agreements do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
from pathlib import Path

import numpy as np
from common import Benchmark, data
from instructions import Emulator, build_llama_cpp
from speed import quantize_peer

from edgekit.checkpoint import Checkpoint
from edgekit.device import load_device
from edgekit.export.export import export, open_tokenizer
from edgekit.export.npu_encoder import export_npu_encoder
from edgekit.export.npu_export import export_npu
from edgekit.export.parity import agreement, divergence
from edgekit.export.targets import ACTIVATIONS, TARGETS
from edgekit.model.builtin import fetch_builtin
from edgekit.model.encoder_config import encoder_config
from edgekit.model.encoder_reference import states
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.runtime.embeddings import Embedder, pooled
from edgekit.runtime.providers import Processor
from edgekit.runtime.session import Session

POSITIONS, EMULATED = 512, 64  # compared on the CPU; of them, those that the emulated Hexagon computes too
CONTEXT = 512
SENTENCES = 50


def arm(bench: Benchmark, work: Path, *, tokens: int) -> None:
    emulator = Emulator(work, "cortex-a76")
    model = work / "q4_0.gguf"
    if not model.exists():
        quantize_peer(fetch_builtin("smollm2-135m"), model)
    ours = {"15, the default": emulator.edgekit(work / "small.arm", tokens)}
    for bits in ("mixed", "8"):
        bundle = work / f"small.arm-{bits}"
        export(
            open_model(str(work / "small")), bundle, target=TARGETS["arm"], activations=ACTIVATIONS[bits],
            accept_drift=True, force=True,
        )  # fmt: skip
        ours[bits] = emulator.edgekit(bundle, tokens)
    theirs = emulator.llama_cpp(build_llama_cpp(work / "llama", "cortex-a76"), model, tokens)
    note = "cortex-a76, one thread; all that runs is counted"
    rows = {f"edgekit int4, bits of activations: {bits}": counts for bits, counts in ours.items()}
    for name, counts in {**rows, "llama.cpp Q4_0, 8-bit activations": theirs}.items():
        bench.value(f"instructions per token, {name}", statistics.fmean(counts) / 1e6, "M", n=len(counts), note=note)
    for bits, counts in ours.items():
        bench.at_most(f"instructions, edgekit / llama.cpp, bits of activations: {bits}", sum(counts) / sum(theirs), 1.1)


def npu(bench: Benchmark, checkpoint: Checkpoint, work: Path, *, provider: str) -> None:
    with gzip.open(data("text/wikitext2_valid.raw.txt.gz"), "rt", encoding="utf-8") as file:
        text = file.read(60_000)
    ids = open_tokenizer(checkpoint).encode(text[20_000:]).ids[:POSITIONS]
    device = load_device("snapdragon-8-elite") if provider == "qnn" else None
    folder = work / f"small.{provider}"
    manifest = export_npu(
        checkpoint, folder, target=TARGETS[f"npu-{provider}"], device=device, context=CONTEXT,
        calibration=text[:20_000], force=True,
    )  # fmt: skip
    for row in manifest.measurements:
        if row.name.startswith("compiled"):
            bench.measurements.append(row)
    expected = forward(checkpoint, [ids])[0]
    runs: list[tuple[Processor, int]] = [("cpu", POSITIONS)] + ([("npu", EMULATED)] if provider == "qnn" else [])
    for processor, count in runs:
        engine = Session.open(folder, threads=1, processor=processor).engine
        got = engine.forward(ids[:count], keep=count)
        share = float(agreement(expected[:count], got).mean())
        kl = float(divergence(expected[:count], got).mean())
        bench.value(f"mean KL to the NumPy forward, {engine.kernels}", kl, "nat", n=count)
        bench.at_least(f"top-1 agreement, {engine.kernels}, {count} positions", share, 0.95)


def encoder(bench: Benchmark, work: Path, *, provider: str) -> None:
    """MiniLM's embeddings of sentences beside the NumPy forward's."""
    checkpoint = open_model("minilm-l6")
    folder = work / f"minilm.{provider}"
    device = load_device("snapdragon-8-elite") if provider == "qnn" else None
    manifest = export_npu_encoder(checkpoint, folder, target=TARGETS[f"npu-{provider}"], device=device, force=True)
    bench.measurements += [row for row in manifest.measurements if row.name.startswith("compiled")]
    with gzip.open(data("text/wikitext2_valid.raw.txt.gz"), "rt", encoding="utf-8") as file:
        texts = [line.strip()[:300] for line in file.read(60_000).splitlines() if len(line) > 100][:SENTENCES]
    config = encoder_config(checkpoint.config)
    embedder = Embedder.open(folder, threads=1, processor="cpu")
    rows = [np.array([embedder.tokenizer.encode(text).ids]) for text in texts]
    expected = np.concatenate([pooled(states(checkpoint, config, ids), embedder.spec) for ids in rows])
    runs: list[tuple[Processor, int]] = [("cpu", len(texts))] + ([("npu", 4)] if provider == "qnn" else [])
    for processor, count in runs:
        embedder = Embedder.open(folder, threads=1, processor=processor)
        cosines = np.sum(expected[:count] * embedder.embed(texts[:count]), axis=1)
        bench.at_least(f"MiniLM: lowest cosine to the NumPy forward, {embedder.encoder.kernels}, {count} sentences",
                       float(cosines.min()), 0.99)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="32 tokens under emulation instead of 128")
    parser.add_argument("--only", choices=["arm", "qnn", "openvino"], help="one section")
    parser.add_argument("--work", type=Path, default=Path("build/arm64"), help="the folder of make test-arm")
    options = parser.parse_args()
    bench = Benchmark("targets")
    if options.only in (None, "arm"):
        arm(bench, options.work, tokens=32 if options.quick else 128)
    for provider in ("qnn", "openvino"):
        if options.only in (None, provider):
            encoder(bench, options.work, provider=provider)
            npu(bench, open_model(str(options.work / "small")), options.work, provider=provider)
    bench.finish(as_json=options.json)


if __name__ == "__main__":
    main()
