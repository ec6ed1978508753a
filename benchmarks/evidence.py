"""Is the evidence right? Our scores against lm-eval's and torch's and llama.cpp's, our statistics by simulation, our
store under kill -9.

Needs edgekit[compress,eval,deploy] and llama-cpp-python, and the evaluation data (EDGEKIT_DATA).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Benchmark, data

from edgekit.compress import compress
from edgekit.evaluate.choices import load_items
from edgekit.evaluate.paired import SIGNIFICANT, compare_answers, smooth_changes, t_test
from edgekit.evaluate.perplexity import perplexity
from edgekit.evaluate.scorer import open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.reproduce import reproduce

MODEL = "smollm2-135m"
TASKS = ("arc_easy", "piqa", "hellaswag", "lambada_openai")
WINDOW = 512


def main() -> None:
    options = arguments()
    bench = Benchmark("evidence")
    sections: dict[str, Callable[[], None]] = {
        "statistics": lambda: statistics(bench, trials=200 if options.quick else 4000),
        "store": lambda: store(bench),
        "perplexity": lambda: perplexities(bench, windows=3 if options.quick else 12),
        "reproduce": lambda: reproduction(bench),
        "scores": lambda: scores(bench, items=60 if options.quick else 500),
    }
    for name, run in sections.items():
        if options.only in (None, name):
            print(f"[{name}]", file=sys.stderr, flush=True)
            run()
    bench.finish(as_json=options.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer trials, items and windows, under ten minutes")
    parser.add_argument("--only", metavar="SECTION", help="statistics, store, perplexity, reproduce or scores")
    return parser.parse_args()


def statistics(bench: Benchmark, *, trials: int) -> None:
    """2,000 questions of four choices, answered by two models that differ by noise alone, and with a drop of 2 points.

    Each model's log-likelihoods are a question's own (deviation 4 nats, the right one 4 higher, which is about what
    SmolLM2 has on ARC-Easy) and noise; more noise, more answers that flip by chance. The drop is planted as `broken`:
    of 40 right answers, drawn at random, the right and the best wrong choice change places; and as `shifted`: every
    right choice loses so much that 40 answers turn. Each level of noise draws its own questions; of identical models
    three deviations of the count are allowed, as ten checks of an exact test each at one and a half would fail often.
    """
    for seed, noise in enumerate((0.19, 0.4, 0.8, 1.2, 1.8)):
        rng, flips = np.random.default_rng(seed), []
        found: dict[str, list[int]] = {}
        for trial in range(trials):
            question = 4 * rng.standard_normal((2000, 4)) + [4, 0, 0, 0]
            a, same = (question + noise * rng.standard_normal((2000, 4)) for _ in "ab")
            flips.append(float(np.mean((a.argmax(1) == 0) != (same.argmax(1) == 0))))
            pairs = [("same", same)]
            if trial < trials // 4:
                pairs += [("broken", broken(same, rng)), ("shifted", shifted(same))]
            for name, b in pairs:
                share = compare_answers((a.argmax(1) == 0).tolist(), (b.argmax(1) == 0).tolist())
                changes = smooth_changes(a.tolist(), b.tolist(), [0] * 2000)
                found.setdefault(f"{name}, McNemar", []).append(share.significant)
                found.setdefault(f"{name}, smooth", []).append(t_test(changes) < SIGNIFICANT)
        percent = {name: 100 * float(np.mean(hits)) for name, hits in found.items()}
        mean = float(np.mean(flips))
        label = f"{100 * mean:.0f} % flips"
        for name, value in percent.items():
            bench.value(f"{label}: {name}: significant", value, "%", n=len(found[name]))
        error = 100 * 3 * math.sqrt(0.05 * 0.95 / trials)
        for test in ("McNemar", "smooth"):
            bench.at_least(
                f"{label}: identical, not significant, % ({test})", 100 - percent[f"same, {test}"], 95 - error
            )
        if mean < 0.08:
            bench.at_least(f"{label}: drop found, % (McNemar)", min(percent[f"{k}, McNemar"] for k in PLANTS), 80)
        if mean < 0.16:
            bench.at_least(f"{label}: drop found, % (smooth)", min(percent[f"{k}, smooth"] for k in PLANTS), 80)


PLANTS = ("broken", "shifted")


def broken(sums: Any, rng: np.random.Generator) -> Any:
    lost = rng.choice(np.flatnonzero(sums.argmax(1) == 0), len(sums) // 50, replace=False)
    wrong = 1 + sums[lost, 1:].argmax(1)
    found = sums.copy()
    found[lost, 0], found[lost, wrong] = sums[lost, wrong], sums[lost, 0]
    return found


def shifted(sums: Any) -> Any:
    margins = sums[:, 0] - sums[:, 1:].max(1)
    return sums - [np.sort(margins[margins > 0])[len(sums) // 50], 0, 0, 0]


def store(bench: Benchmark) -> None:
    """The fault injection of tests/test_store.py: processes that are killed, or find the disk full, before each change
    that they make on it; tampered and unsigned bundles."""
    root = Path(__file__).parent.parent
    words = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "tests/test_store.py"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    print(done.stdout[-300:], file=sys.stderr)
    bench.at_most("failures of the store: killed at every step, tampered, unsigned, disk full", done.returncode, 0)


def hugging_face() -> Any:
    """lm-eval's Hugging Face backend on the source checkpoint, in float32."""
    gguf = fetch_builtin(MODEL)
    import transformers
    from lm_eval.models.huggingface import HFLM

    source = open_model(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in source.assets.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(source.decoder.eos_ids[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu", max_length=2048)


def scores(bench: Benchmark, *, items: int) -> None:
    """The same items, by lm-eval's backend and by `edgekit eval`'s code."""
    from lm_eval.api.instance import Instance

    from edgekit.evaluate.choices import answers

    peer = hugging_face()
    with open_scorer(MODEL, context=2048) as scorer:
        for task in TASKS:
            questions = load_items(data(f"eval/{task}.jsonl.gz"), limit=items)
            pairs = [pair for item in questions for pair in item.pairs]
            asked = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
            clock = time.perf_counter()
            theirs = peer.loglikelihood(asked, disable_tqdm=True)
            between = time.perf_counter()
            ours = answers(scorer, questions)
            seconds = time.perf_counter() - between
            apart = max(abs(x - y) for x, (y, _) in zip((x for a in ours for x in a.sums), theirs, strict=True))
            rest = iter(theirs)
            right = []
            for item in questions:
                sums, greedy = zip(*(next(rest) for _ in item.pairs), strict=True)
                right.append(greedy[0] if len(sums) == 1 else int(np.argmax(sums)) == item.answer)
            mine, other = 100 * float(np.mean([a.right for a in ours])), 100 * float(np.mean(right))
            bench.value(f"{task}, edgekit", mine, "%", n=len(questions), note=f"{seconds:.0f} s")
            bench.value(
                f"{task}, lm-eval's Hugging Face backend", other, "%", n=len(questions), note=f"{between - clock:.0f} s"
            )
            bench.value(f"{task}, largest difference of a log-likelihood", apart, "nats", n=len(pairs))
            bench.at_most(f"{task}: difference, points", abs(mine - other), 0.2)


def perplexities(bench: Benchmark, *, windows: int) -> None:
    """Ours, an independent loop in torch, and llama.cpp's logits, on the same windows."""
    import torch
    from llama_cpp import Llama

    model, gguf = hugging_face().model, fetch_builtin(MODEL)
    text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
    with open_scorer(MODEL, context=WINDOW) as scorer:
        ours = perplexity(scorer, text, window=WINDOW, max_windows=windows).value
        ids = scorer.tokenizer.encode(text, add_special_tokens=False).ids
        first = scorer.tokenizer.encode("", add_special_tokens=True).ids[:1]
    llama = Llama(str(gguf), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)
    losses_torch, losses_llama = [], []
    for index in range(windows):
        tokens = ids[index * WINDOW : (index + 1) * WINDOW]
        tokens[: len(first)] = first
        targets = torch.tensor(tokens[WINDOW // 2 + 1 :])
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, WINDOW // 2 : -1]
        losses_torch.append(torch.nn.functional.cross_entropy(logits.double(), targets).item())
        llama.reset()
        llama.eval(tokens)
        scored = torch.from_numpy(np.array(llama.scores[WINDOW // 2 : WINDOW - 1]))
        losses_llama.append(torch.nn.functional.cross_entropy(scored.double(), targets).item())
    loop, cpp = math.exp(np.mean(losses_torch)), math.exp(np.mean(losses_llama))
    for name, value in (("edgekit", ours), ("torch", loop), ("llama.cpp", cpp)):
        bench.value(f"perplexity, {name}", value, "", n=windows * (WINDOW - 1 - WINDOW // 2))
    bench.at_most("perplexity against torch, relative", abs(ours / loop - 1), 1e-4)
    bench.at_most("perplexity against llama.cpp, relative", abs(ours / cpp - 1), 0.01)


def reproduction(bench: Benchmark) -> None:
    """The demo's bundle, and again in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        small, bundle = Path(folder) / "small", Path(folder) / "bundle"
        compress(open_model(MODEL), load_recipe("int4"), small)
        export(open_model(str(small)), bundle, target=find_target("x86"))
        found = reproduce(bundle)
    bench.value("files that are the same", len(found.same), "")
    bench.at_most("files of the demo bundle that differ when reproduced", len(found.different), 0)


if __name__ == "__main__":
    main()
