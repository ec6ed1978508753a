"""Writes docs/results/card-RECIPE.md and docs/results/policy.md: built-in recipes on SmolLM2-135M against the source.

    python benchmarks/cards.py --limit 200

runs `edgekit compress`, `export`, `eval --policy`, `card` as one would, and keeps what they print. Results of eval are
taken from its cache where they are known. Needs edgekit[convert] and the evaluation data (EDGEKIT_DATA).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from common import data

from edgekit.host import host_device
from edgekit.manifest import now

MODEL, RECIPES = "smollm2-135m", ("int4", "lossless")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
POLICY = Path("examples") / "evidence" / "policy.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--windows", type=int, default=24, help="windows of text")
    parser.add_argument(
        "--tasks", nargs="+", default=["arc_easy", "piqa", "hellaswag", "lambada_openai"], help="files of questions"
    )
    parser.add_argument("--threads", type=int, help="as of edgekit eval")
    options = parser.parse_args()
    words = ["--text", str(data("text/wikitext2_valid.raw.txt.gz")), "--windows", str(options.windows), "--safety"]
    words += ["--limit", str(options.limit), "--context", "2048"]
    words += [word for task in options.tasks for word in ("--choices", str(data(f"eval/{task}.jsonl.gz")))]
    words += [] if options.threads is None else ["--threads", str(options.threads)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            small, bundle, report = (Path(folder) / name for name in (recipe, f"{MODEL}-{recipe}", f"{recipe}.json"))
            edgekit("compress", MODEL, "-o", small, "-r", recipe)
            edgekit("export", small, "-o", bundle, "--target", "x86")
            ended, said = edgekit("eval", MODEL, bundle, *words, "--policy", POLICY, "-o", report, fails=True)
            edgekit("card", bundle, "--add", report)
            (RESULTS / f"card-{recipe}.md").write_text((bundle / "MODEL_CARD.md").read_text())
            runs.append((recipe, ended, said))
    (RESULTS / "policy.md").write_text(policy_page(runs, options.limit, options.windows))


def edgekit(*words: object, fails: bool = False) -> tuple[int, str]:
    """How a command ended and what it said, results and then remarks. Ends this program when it may not fail."""
    print("edgekit", *words, file=sys.stderr, flush=True)
    call = [sys.executable, "-c", "from edgekit.cli.main import main; main()", *map(str, words)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode > int(fails):
        sys.exit(done.stderr)
    return done.returncode, done.stdout + done.stderr


def policy_page(runs: list[tuple[str, int, str]], limit: int, windows: int) -> str:
    lines = [
        "# A policy at work",
        "",
        f"Written by `benchmarks/cards.py`, {now()}, {', '.join(host_device().fingerprint().values())}.",
        "",
        f"`edgekit eval {MODEL} BUNDLE --safety --policy {POLICY}` for two recipes, on {limit} questions a task and",
        f"{windows} windows of WikiText-2. Their cards: "
        + ", ".join(f"[{recipe}](card-{recipe}.md)" for recipe, _, _ in runs)
        + ".",
        "",
        "```toml",
        (ROOT / POLICY).read_text().rstrip(),
        "```",
    ]
    for recipe, ended, said in runs:
        lines += ["", f"## {recipe}: exit status {ended}", "", "```", said.rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
