"""Prefill and decode rates on the same int4 weights, beside onnxruntime-genai, in one run.

Our checkpoint (all matrices at 4 bits, symmetric, blocks of 32) is made dense again and given to genai's own model
builder, which rounds it to the same grid; that the codes agree is itself a check. Then both runtimes take turns on
this machine: 512 tokens of prompt, 128 tokens of greedy decoding from an empty cache, each with its own default of
threads for these cores. One turn each is discarded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
from common import Benchmark, arguments

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
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
        compress(open_model("smollm2-135m"), load_recipe(str(RECIPE)), work / "small")
        checkpoint = open_checkpoint(work / "small")
        export(checkpoint, work / "ours", target=find_target(host_target()))
        build_peer(checkpoint, work / "dense", work / "peer")
        bench.at_least("share of equal codes in both models, %", equal_codes(checkpoint, work / "peer"), 100.0)
        compare(bench, work, repetitions=5 if options.quick else 9)
        python_share(bench, Session.open(work / "ours"))
    bench.finish(as_json=options.json)


RECIPE = Path(__file__).parent / "recipes" / "int4-symmetric.toml"


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
    import onnxruntime_genai as genai

    session, peer = Session.open(work / "ours"), genai.Model(str(work / "peer"))
    rates: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):
        ids = np.random.default_rng(repetition).integers(0, session.bundle.spec.vocabulary, PROMPT).astype(np.int32)
        for who, turn in (("edgekit", lambda i: ours(session, i)), ("onnxruntime-genai", lambda i: theirs(peer, i))):
            prefill, decode = turn(ids)
            if repetition:
                rates.setdefault(f"{who} prefill {PROMPT}", []).append(prefill)
                rates.setdefault(f"{who} decode {ANSWER}", []).append(decode)
    medians = {name: bench.samples(name, values, unit="tok/s") for name, values in rates.items()}
    for test in (f"prefill {PROMPT}", f"decode {ANSWER}"):
        bench.at_least(
            f"{test}: edgekit over onnxruntime-genai",
            medians[f"edgekit {test}"] / medians[f"onnxruntime-genai {test}"],
            1.0,
        )


def ours(session: Session, ids: np.ndarray) -> tuple[float, float]:
    engine = session.engine
    engine.rewind(0)
    clock = time.perf_counter()
    engine.forward(ids.tolist())[-1].argmax()
    prefill = PROMPT / (time.perf_counter() - clock)
    engine.rewind(0)
    token = int(engine.forward([int(ids[0])])[-1].argmax())
    clock = time.perf_counter()
    for _ in range(ANSWER):
        token = int(engine.forward([token])[-1].argmax())
    return prefill, ANSWER / (time.perf_counter() - clock)


def theirs(model: object, ids: np.ndarray) -> tuple[float, float]:
    import onnxruntime_genai as genai

    def generator(length: int) -> object:
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        return genai.Generator(model, params)

    begin = generator(PROMPT + 1)
    clock = time.perf_counter()
    begin.append_tokens(ids)
    begin.generate_next_token()
    prefill = PROMPT / (time.perf_counter() - clock)
    begin = generator(ANSWER + 2)
    begin.append_tokens(ids[:1])
    begin.generate_next_token()
    clock = time.perf_counter()
    for _ in range(ANSWER):
        begin.generate_next_token()
    return prefill, ANSWER / (time.perf_counter() - clock)


def python_share(bench: Benchmark, session: Session) -> None:
    """Time of a decode step outside onnxruntime, in the loop that users run: sampling, text, bookkeeping."""
    shares = []
    for seed in range(5):
        answer = session.generate(
            "Once upon a time", max_tokens=ANSWER, sampling=Sampling(temperature=0.8, top_p=0.9, seed=seed)
        )
        session.engine.run_seconds = 0.0
        for _ in answer:
            pass
        decode = sum(answer.timing.gaps)
        inside = session.engine.run_seconds - answer.timing.prefill
        shares.append(100 * (decode - inside) / decode)
    share = bench.samples("python's share of a decode step, top-p sampling", shares, unit="%")
    bench.at_most("python's share of a decode step, %", share, 5.0)


if __name__ == "__main__":
    main()
