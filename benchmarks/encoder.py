"""Embeddings: all-MiniLM-L6-v2 in 8 and 4 bits against the same model in float32, in one run on the same batches.

A thousand sentences of WikiText-2 (raw validation) and the paragraphs of SQuAD. The baseline is the float32 graph in
stock onnxruntime, which is ours too: built of its fused operators, so no slower than what tracing gives; with torch at
hand, its embeddings are held against transformers'. A further row is what onnxruntime's own dynamic quantisation makes
of the baseline's file. Turns alternate between the contestants, and each figure is the median over turns.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Benchmark, arguments, data

from edgekit.bundle import MODEL, WEIGHTS, EncoderSpec
from edgekit.compress import compress
from edgekit.export.encoder import export_encoder
from edgekit.export.onnx_model import quantize_file
from edgekit.export.targets import find_target, host_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.embeddings import Embedder, Encoder, Floats

THREADS = 2
SENTENCES = 1000


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("encoder")
    few, turns = sentences(), 3 if options.quick else 7
    long = paragraphs()[: 100 if options.quick else 500]
    with tempfile.TemporaryDirectory() as work:
        bundles = make_bundles(Path(work))
        embedders = {name: Embedder.open(path, threads=THREADS) for name, path in bundles.items()}
        base = embedders["float32"]
        embedders["onnxruntime int8"] = stock_int8(bundles["float32"], Path(work) / "stock", base)
        vectors = {name: embedder.embed(few) for name, embedder in embedders.items()}  # warms up, too
        measure_speed(bench, embedders, few[: 300 if options.quick else None], long, turns)
        sizes = {name: size_mb(path) for name, path in bundles.items()}
    for name, mb in sizes.items():
        bench.value(f"{name}: graph and weights", mb, "MB")
    cosines = {name: measure_quality(bench, name, vectors["float32"], vectors[name]) for name in vectors}
    if importlib.util.find_spec("torch"):
        difference = against_transformers(few, base)
        bench.value("float32: largest difference to transformers", difference, "", n=len(few))
        bench.at_most("float32 against transformers, largest difference", difference, 1e-5)
    speed = {row.name: row.value or 0.0 for row in bench.measurements if row.unit == "texts/s"}
    bench.at_least(
        "8 bits: lowest cosine with float32, 1,000 sentences", min(cosines["encoder"], cosines["int8"]), 0.99
    )
    for what in ("sentences", "paragraphs"):
        ratio = speed[f"encoder, {what}"] / speed[f"float32, {what}"]
        bench.at_least(f"8 bits (recipe encoder): times as fast as float32, {what}", ratio, 2.0)
    bench.at_least("8 bits: times smaller than float32", sizes["float32"] / sizes["int8"], 3.0)
    bench.finish(as_json=options.json)


def sentences() -> list[str]:
    """The first thousand sentences of 5 to 40 words."""
    with gzip.open(data("text/wikitext2_valid.raw.txt.gz"), "rt", encoding="utf-8") as lines:
        text = " ".join(line.strip() for line in lines if not line.startswith(" ="))
    found = [part for part in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(part.split()) <= 40]
    return found[:SENTENCES]


def paragraphs() -> list[str]:
    with gzip.open(data("assistant/squad_docs.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def make_bundles(work: Path) -> dict[str, Path]:
    source = open_model("minilm-l6")
    target = find_target(host_target())
    bundles = {"float32": work / "float32"}
    export_encoder(source, bundles["float32"], target=target)
    for recipe in ("encoder", "int8", "int4"):
        compress(source, load_recipe(recipe), work / f"{recipe}.checkpoint")
        bundles[recipe] = work / recipe
        export_encoder(open_model(str(work / f"{recipe}.checkpoint")), bundles[recipe], target=target)
    return bundles


def stock_int8(bundle: Path, output: Path, base: Embedder) -> Embedder:
    """onnxruntime's dynamic quantisation of the float32 graph, behind the same tokenizer and batches."""
    shutil.copytree(bundle, output)
    quantize_file(bundle / MODEL, output.with_name("stock.onnx.folder"))
    spec: EncoderSpec = base.spec
    encoder = Encoder(output.with_name("stock.onnx.folder") / MODEL, spec, threads=THREADS)
    return Embedder(spec, encoder, base.tokenizer)


def measure_speed(
    bench: Benchmark, embedders: dict[str, Embedder], few: list[str], long: list[str], turns: int
) -> None:
    """Texts a second over both sets, by turns, and the time of a single sentence."""
    for what, texts in (("sentences", few), ("paragraphs", long)):
        rates: dict[str, list[float]] = {name: [] for name in embedders}
        for _ in range(turns if what == "sentences" else max(2, turns // 2)):
            for name, embedder in embedders.items():
                clock = time.perf_counter()
                embedder.embed(texts, truncate=True)
                rates[name].append(len(texts) / (time.perf_counter() - clock))
        for name, values in rates.items():
            bench.samples(f"{name}, {what}", values, unit="texts/s", note=f"{len(texts)} texts, {THREADS} threads")
    for name, embedder in embedders.items():
        bench.samples(f"{name}, one sentence", [single_ms(embedder, text) for text in few[:100]], unit="ms")


def single_ms(embedder: Embedder, text: str) -> float:
    clock = time.perf_counter()
    embedder.embed([text])
    return 1e3 * (time.perf_counter() - clock)


def measure_quality(bench: Benchmark, name: str, expected: Floats, got: Floats) -> float:
    """The lowest cosine of a contestant's vectors with the baseline's."""
    cosines = np.sum(expected * got, axis=1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(got, axis=1)
    lowest = float(cosines.min())
    bench.value(f"{name}: mean cosine with float32", float(cosines.mean()), "", n=len(cosines))
    bench.value(f"{name}: lowest cosine with float32", lowest, "", n=len(cosines))
    return lowest


def against_transformers(texts: list[str], base: Embedder) -> float:
    """The largest difference of any number from what transformers computes, pooled and normalised as published."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = fetch_builtin("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours, worst = base.embed(texts), 0.0
    with torch.no_grad():
        for start in range(0, len(texts), 50):
            fed = tokenizer(
                texts[start : start + 50], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            states, mask = model(**fed).last_hidden_state, fed["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            theirs = torch.nn.functional.normalize(mean, dim=1).numpy()
            worst = max(worst, float(np.abs(theirs - ours[start : start + 50]).max()))
    return worst


def size_mb(bundle: Path) -> float:
    return ((bundle / MODEL).stat().st_size + (bundle / WEIGHTS).stat().st_size) / 1e6


if __name__ == "__main__":
    main()
