"""Is the evidence right? Our scores against lm-eval's and torch's and llama.cpp's, our statistics by simulation, our
store under kill -9.

Needs edgekit[compress,eval,deploy] and llama-cpp-python, and the evaluation data (EDGEKIT_DATA).
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Benchmark, arguments, data

from edgekit.compress import compress
from edgekit.evaluate.choices import load_items
from edgekit.evaluate.paired import compare_answers
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
    options = arguments(__doc__ or "")
    bench = Benchmark("evidence")
    statistics(bench, trials=500 if options.quick else 2000)
    store(bench)
    gguf = fetch_builtin(MODEL)
    peer = hugging_face(gguf)
    scores(bench, peer, items=60 if options.quick else 500)
    perplexities(bench, peer, gguf, windows=3 if options.quick else 12)
    reproduction(bench)
    bench.finish(as_json=options.json)


def statistics(bench: Benchmark, *, trials: int) -> None:
    """Identical models differ by noise alone; a drop of two points is planted on 2,000 items. Noise: 5% of the
    answers are drawn anew for both, so about 2.5% differ by chance; with more of that the drop is harder to find."""
    rng = np.random.default_rng(0)
    quiet = found = 0
    for _ in range(trials):
        a = rng.random(2000) < 0.6
        noisy = rng.random(2000) < 0.05
        same = np.where(noisy, rng.random(2000) < 0.5, a)
        a = np.where(noisy, rng.random(2000) < 0.5, a)
        quiet += not compare_answers(a.tolist(), same.tolist()).significant
        worse = same & ~(rng.random(2000) < 0.02 / 0.6)
        found += compare_answers(a.tolist(), worse.tolist()).significant
    bench.value("identical models, not significant", 100 * quiet / trials, "%", n=trials)
    bench.value("planted drop of 2 points, found", 100 * found / trials, "%", n=trials)
    error = 100 * 1.645 * math.sqrt(0.05 * 0.95 / trials)
    bench.at_least("identical models: no significance, % (95 less sampling error)", 100 * quiet / trials, 95 - error)
    bench.at_least("planted 2-point drop on 2,000 items found, %", 100 * found / trials, 80)


def store(bench: Benchmark) -> None:
    """The fault injection of tests/test_store.py, in processes that kill themselves."""
    root = Path(__file__).parent.parent
    words = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "tests/test_store.py"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    print(done.stdout[-300:], file=sys.stderr)
    bench.at_most("failures of the store: killed at every step, tampered, unsigned, disk full", done.returncode, 0)


def hugging_face(gguf: Path) -> Any:
    """lm-eval's Hugging Face backend on the source checkpoint, in float32."""
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


def scores(bench: Benchmark, peer: Any, *, items: int) -> None:
    """The same items, by lm-eval's backend and by `edgekit eval`'s code."""
    from lm_eval.api.instance import Instance

    from edgekit.evaluate.choices import answers

    with open_scorer(MODEL, context=2048) as scorer:
        for task in TASKS:
            questions = load_items(data(f"eval/{task}.jsonl.gz"), limit=items)
            pairs = [pair for item in questions for pair in item.pairs]
            asked = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
            theirs = iter(peer.loglikelihood(asked, disable_tqdm=True))
            ours = answers(scorer, questions)
            right = []
            for item in questions:
                sums, greedy = zip(*(next(theirs) for _ in item.pairs), strict=True)
                right.append(greedy[0] if len(sums) == 1 else int(np.argmax(sums)) == item.answer)
            mine, other = 100 * float(np.mean([a.right for a in ours])), 100 * float(np.mean(right))
            bench.value(f"{task}, edgekit", mine, "%", n=len(questions))
            bench.value(f"{task}, lm-eval's Hugging Face backend", other, "%", n=len(questions))
            bench.at_most(f"{task}: difference, points", abs(mine - other), 0.2)


def perplexities(bench: Benchmark, peer: Any, gguf: Path, *, windows: int) -> None:
    """Ours, an independent loop in torch, and llama.cpp's logits, on the same windows."""
    import torch
    from llama_cpp import Llama

    text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
    with open_scorer(MODEL, context=WINDOW) as scorer:
        ours = perplexity(scorer, text, window=WINDOW, max_windows=windows).value
        ids = scorer.tokenizer.encode(text, add_special_tokens=False).ids
        first = scorer.tokenizer.encode("", add_special_tokens=True).ids[:1]
    llama = Llama(str(gguf), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False, n_threads=1)
    losses_torch, losses_llama = [], []
    for index in range(windows):
        tokens = ids[index * WINDOW : (index + 1) * WINDOW]
        tokens[: len(first)] = first
        targets = torch.tensor(tokens[WINDOW // 2 + 1 :])
        with torch.inference_mode():
            logits = peer.model(torch.tensor([tokens])).logits[0, WINDOW // 2 : -1]
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
