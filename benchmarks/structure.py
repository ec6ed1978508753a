"""What taking structure out of SmolLM2-135M-Instruct costs, and what it saves.

    exact    full ranks and bonds, foretold errors, tensorly's tensor train, scikit-learn's parts of NPIB    seconds
    table    perplexity of each way at 10 % and 20 % of the decoder's parameters (`structure_rows.py`)       the longest
    sizes    perplexity and bytes after quantisation: structure with more bits against all of it with fewer
    time     the whole model's whitened decomposition, seconds on this machine
    speed    models of a fifth less against the source at the same bits through this machine's target, in turns
    factors  a factored model against its dense one, in turns

Raw WikiText-2 validation, windows of 1024 tokens, second halves scored, in torch on float weights, no healing.
Calibration: Wikipedia and C4 (text/wikipedia_sample, text/c4_calibration), none of WikiText-2; no twelve words in a row
are in both. Settings of `prune.planned` were picked on windows 1 to 12, those of the mixture on 1 to 24; windows 25
to 48 are measured too ("fresh").
Rows are kept in `--store` as they are done, and a run that is stopped goes on; with `--jobs` rows of the table are
measured in several processes, with `--compute cuda` torch works on a GPU. `--quick`: 20 % only, 6 calibration windows
for 16, 6 windows for 24; the sections sizes, time and factors and the longest rows left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Benchmark, data
from structure_rows import CHAINS, MODEL_NAME, Store, Work, compressed, measured, measured_beside, model_of
from tokenizers import Tokenizer

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.merge.similarity import SIGMA, diffusion_map, kernel, npib
from edgekit.model.sources import open_model
from edgekit.prune.elimination import error_of, rank_columns, refit, regular
from edgekit.quant.methods import Int4
from edgekit.runtime.session import Session
from edgekit.tn.lowrank import truncated
from edgekit.tn.mpo import decomposed, full_bonds, schmidt_values, site_shapes
from edgekit.tn.steps import LowRank
from edgekit.tn.whitening import spectrum

SECTIONS = ("exact", "table", "sizes", "time", "speed", "factors")
MIXTURE_20, FASTER, MINUTES = 24.0, 1.15, 5.0
LONG = (
    "planned ranks",
    "planned ranks, following",
    "whitened SVD",
    "MPO",
    "plain SVD",
    "dropped, repaired",
)  # not in --quick
SIZES_MB = (60.0, 50.0)
TOKENS = 64  # a turn: short, so that a machine that changes its pace changes it between turns
NO_SLOWER = 0.97  # of the dense model's rate: what two runs of the same model differ by


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer rows and windows, under ten minutes")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section; may be given again")
    parser.add_argument("--store", type=Path, default=Path("structure.rows"), help="where finished rows are kept")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that measure rows of the table beside each other"
    )
    parser.add_argument("--compute", default="cpu", help="where torch computes: cpu, cuda")
    options = parser.parse_args()
    bench, store = Benchmark("structure"), Store(options.store)
    sections = options.only or [s for s in SECTIONS if not (options.quick and s in ("sizes", "time", "factors"))]
    samples, windows = (6, 6) if options.quick else (16, 24)
    tokenizer = Tokenizer.from_str(open_model(MODEL_NAME).assets["tokenizer.json"].decode())
    ids = tokenizer.encode(read_text(data("text/wikitext2_valid.raw.txt.gz")), add_special_tokens=False).ids
    work = Work(samples, windows, ids, options.compute)
    if "exact" in sections:
        exact(bench)
    if "table" in sections:
        chains = [names for names in CHAINS if not (options.quick and names[0] in LONG)]
        shares = (20,) if options.quick else (20, 10)
        measured_beside(store, [(names, percent) for names in chains for percent in shares], work, jobs=options.jobs)
        for percent in shares:
            table(bench, store, percent, [name for names in chains for name in names], work)
    if "sizes" in sections:
        sizes(bench, store, work, jobs=options.jobs)
    if "time" in sections:
        whole_model(bench, store)
    if "speed" in sections:
        speed(bench, store, work, rounds=10 if options.quick else 40)
    if "factors" in sections:
        factors(bench, store, rounds=20)
    bench.finish(as_json=options.json)


def exact(bench: Benchmark) -> None:
    """Errors against what was foretold, and our parts against those of the usual libraries."""
    from sklearn.feature_selection import mutual_info_regression
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.neighbors import NearestNeighbors
    from sklearn.utils.extmath import randomized_svd
    from tensorly.decomposition import tensor_train_matrix

    random = np.random.default_rng(0)
    W = random.standard_normal((96, 64)).astype(np.float32)
    X = random.standard_normal((400, 64)) * np.geomspace(1, 20, 64)
    G = X.T @ X
    full = truncated(W, G, 64, where="w").dense()
    bench.at_most("full rank, whitened: largest relative difference", float(np.abs(full - W).max()), 1e-5)
    sites = site_shapes(W.shape, 3)
    assert sites is not None
    chain = decomposed(W, sites, full_bonds(sites), where="w").dense()
    bench.at_most("full bonds: largest relative difference", float(np.abs(chain - W).max()), 1e-5)
    seen = spectrum(W, G, where="w")
    U = seen.left[:, :24]
    difference = U @ (U.T @ W.astype(np.float64)) - W
    error = float(np.sqrt(np.vdot(difference, difference @ G)))
    bench.at_most("whitened rank: error against the tail, relative", abs(error / seen.tail(24) - 1), 1e-6)
    two = site_shapes(W.shape, 2)
    assert two is not None
    tail = float(np.sqrt(np.square(schmidt_values(W, two, 1)[20:]).sum()))
    reached = float(np.linalg.norm(decomposed(W, two, (20,), where="w").dense().astype(np.float64) - W))
    bench.at_most("bond: error against the tail, relative", abs(reached / tail - 1), 1e-6)
    shape = [o for o, _ in sites] + [i for _, i in sites]
    theirs = tensor_train_matrix(W.astype(np.float64).reshape(shape), rank=[1, 9, 9, 1]).to_tensor().reshape(W.shape)
    ours = decomposed(W, sites, (9, 9), where="w").dense()
    bench.at_most("tensor train: ours against tensorly's", float(np.abs(ours - theirs).max()), 1e-5)

    one, other = random.standard_normal((60, 16)), random.standard_normal((60, 16))
    other[:, :8] = one[:, :8]
    K = np.exp(-np.sqrt(euclidean_distances(one) / SIGMA))
    K = K / np.sqrt(np.outer(K.sum(0), K.sum(0)))
    A = K / np.sqrt(np.outer(K.sum(0), K.sum(0)))
    bench.at_most("diffusion kernel: ours against scikit-learn's distances", float(np.abs(kernel(one) - A).max()), 1e-9)
    left = randomized_svd(A, 3, n_iter=50, random_state=0)[0]
    phi = left[:, 1:] / left[:, :1]
    largest = phi[np.abs(phi).argmax(0), [0, 1]]
    moved = float(np.abs(diffusion_map(one) - phi * np.where(largest < 0, -1, 1)).max())
    bench.at_most("diffusion map: ours against scikit-learn's singular vectors", moved, 1e-6)
    maps = [phi / phi.std(0) for phi in map(diffusion_map, (one, other))]  # not ranks: theirs breaks ties by noise
    shared = [mutual_info_regression(maps[0][:, :1], y, n_neighbors=5)[0] for y in maps[1].T]
    shared += [mutual_info_regression(maps[0][:, 1:], y, n_neighbors=5)[0] for y in maps[1].T]
    H = [-np.log(50 / (60 * NearestNeighbors(n_neighbors=51).fit(m).kneighbors(m)[0][:, -1] ** 2)).mean() for m in maps]
    reference = float(np.mean(shared) / np.sqrt(abs(H[0] * H[1])))
    bench.at_most("NPIB: ours against scikit-learn's parts", abs(npib(*maps) - reference), 1e-6)

    Y = random.standard_normal((2000, 256)) @ (random.standard_normal((256, 256)) * 0.98 ** np.arange(256))
    V, H = random.standard_normal((64, 256)), regular(Y.T @ Y, 1e-6, where="exact")
    for choice in ("elimination", "interpolative"):
        ranking = rank_columns(V, H, choice=choice)  # type: ignore[arg-type]
        kept = ranking.kept(192)
        found = error_of(V, H, kept, refit(V, H, kept))
        bench.at_most(f"{choice}: error foretold against reached, relative", abs(ranking.errors[192] / found - 1), 1e-6)


def table(bench: Benchmark, store: Store, percent: int, names: list[str], work: Work) -> None:
    """The perplexities at one share, and what has to be best, on the first windows and on the fresh ones."""
    source = measured(store, "source", 0, work)
    rows = {name: measured(store, name, percent, work) for name in names}
    for name, row in {"source": source, **rows}.items():
        title = name if row is source else f"{name}, {percent} %"
        note = f"{row.seconds:.0f} s of work; {row.machine}" if row.seconds > 1 else row.machine
        if row.parameters:
            note = f"{row.parameters / 1e6:.1f} M parameters; {note}"
        bench.value(title, row.perplexity, "ppl", n=work.windows, note=note)
        bench.value(f"{title}, fresh windows", row.fresh, "ppl", n=work.windows)
    for of, where in (("perplexity", ""), ("fresh", ", fresh windows")):
        found = {name: float(getattr(row, of)) for name, row in rows.items()}
        others = min(value for name, value in found.items() if name != "mixture")
        bench.at_most(f"{percent} %: the mixture against the best of the others, ppl{where}", found["mixture"], others)
        bench.at_most(f"{percent} %: merged and repaired against dropping the same layers, ppl{where}",
                      found["merged, repaired"], found["dropped alike"])  # fmt: skip
    if percent == 20:
        bench.at_most("20 %: the mixture, ppl", rows["mixture"].perplexity, MIXTURE_20)


def sizes(bench: Benchmark, store: Store, work: Work, *, jobs: int) -> None:
    """As many bytes in two ways: bits alone, and bits for the model that lost a tenth or a fifth."""
    rows = [(f"{size:g} MB", percent) for size in SIZES_MB for percent in (0, 10, 20)]
    measured_beside(store, [((name,), percent) for name, percent in rows], work, jobs=jobs)
    for name, percent in rows:
        row = measured(store, name, percent, work)
        title = f"{name}, {percent} % pruned"
        bench.value(title, row.perplexity, "ppl", n=work.windows, note=f"{row.seconds:.0f} s of work; {row.machine}")
        bench.value(f"{title}, fresh windows", row.fresh, "ppl", n=work.windows)


def whole_model(bench: Benchmark, store: Store) -> None:
    """Every matrix of every layer, calibrated on 16 windows, written to disk."""
    folder = store.folder / f"timed {time.time():.0f}"
    started = time.perf_counter()
    compressed(folder, LowRank(keep=0.8, multiple=16), samples=16)
    minutes = (time.perf_counter() - started) / 60
    bench.at_most("whole-model whitened decomposition, minutes", minutes, MINUTES)


def speed(bench: Benchmark, store: Store, work: Work, *, rounds: int) -> None:
    """Two models of a fifth less, by layers and by widths, against the source, all by the recipe `int4`.

    Its token table has 8 bits and is not pruned: a third of what a token reads. Again with 4 bits for the table, too.
    """
    models = {
        "source": lambda: open_model(MODEL_NAME),
        "six layers dropped": lambda: model_of(store, "dropped", 20, work),
        "planned 20 %": lambda: model_of(store, "planned", 20, work),
    }
    for table in ("int8", "int4"):
        said = "int4" if table == "int4" else "int4, table int8"
        bundles = {name: bundle(store, f"{name} {said}", model, table=table) for name, model in models.items()}
        rates = race(bundles, rounds=rounds)
        for name, path in bundles.items():
            bench.samples(f"{name}, {said}: decode", rates[name], unit="tok/s")
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            bench.value(f"{name}, {said}: file", size / 1e6, "MB")
        found = {
            name: bench.samples(f"{name}, {said}: decode against the source in turns", ratios, unit="x")
            for name, ratios in ((name, paired(rates["source"], rates[name])) for name in list(models)[1:])
        }
        if table == "int8":
            bench.at_least("20 % pruned by layers: decode against the source, x", found["six layers dropped"], FASTER)


def factors(bench: Benchmark, store: Store, *, rounds: int) -> None:
    """A model of factors as the exporter keeps or contracts them, against the dense one, both at 4 bits."""

    def factored() -> Checkpoint:
        folder = store.folder / "factored 16"
        return open_checkpoint(folder) if folder.exists() else compressed(folder, LowRank(keep=0.6, multiple=32))

    bundles = {
        "dense, int4": bundle(store, "source int4, table int8", lambda: open_model(MODEL_NAME)),
        "factored, int4": bundle(store, "factored int4", factored),
    }
    rates = race(bundles, rounds=rounds)
    for name, values in rates.items():
        bench.samples(f"{name}: decode", values, unit="tok/s")
    ratio = bench.samples("factored: decode against dense in turns", paired(*rates.values()), unit="x")
    bench.at_least("factored at a kept share of 0.6: decode against dense, x", ratio, NO_SLOWER)


def paired(before: list[float], after: list[float]) -> list[float]:
    """Ratios within rounds: what the machine does between rounds is not in them."""
    return [b / a for a, b in zip(before, after, strict=True)]


def bundle(store: Store, name: str, model: Callable[[], Checkpoint], *, table: Any = "int8") -> Path:
    """The bundle of a model at 4 bits for this machine, made once."""
    path = store.folder / f"{name} bundle"
    if not path.exists():
        small = store.folder / name
        if not small.exists():
            compressed(small, Int4(embedding=table), source=model())
        export(open_checkpoint(small), path, target=find_target(host_target()), accept_drift=True)
    return path


def race(bundles: dict[str, Path], *, rounds: int) -> dict[str, list[float]]:
    """Tokens a second over `TOKENS` tokens after a prompt of 32, in turns, from the other end in every second round.

    The first round warms up.
    """
    sessions = {name: Session.open(str(path), context=512) for name, path in bundles.items()}
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    for at in range(rounds + 1):
        for name, session in list(sessions.items())[:: -1 if at % 2 else 1]:
            engine = session.engine
            engine.rewind(0)
            engine.forward(list(range(100, 132)))
            started = time.perf_counter()
            for token in range(TOKENS):
                engine.forward([200 + token])
            if at:
                rates[name].append(TOKENS / (time.perf_counter() - started))
    return rates


if __name__ == "__main__":
    main()
