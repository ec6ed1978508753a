"""Choose the constants of edgekit/assistant/search.py on the fitting part of the questions, and print them.

Rank fusion: recall@5 of 600 questions over a grid of k and the weight of vectors. Relevance: a logistic model of
"the question's article is in the index" over the best cosine and coverage, for 1,000 questions asked of an index that
lacks half of the articles; the threshold lets 19 of 20 of the answerable ones through.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from assistant_data import questions, write_paragraphs

from edgekit.assistant import search as searching
from edgekit.assistant.index import Index
from edgekit.assistant.logistic import fit
from edgekit.assistant.search import search
from edgekit.assistant.update import update
from edgekit.cli.knowledge import open_embedder


def main() -> None:
    embedder = open_embedder(None, threads=2)
    with tempfile.TemporaryDirectory() as work:
        whole, half = (Index.open(Path(work) / f"{name}.db", embedder, create=True) for name in ("whole", "half"))
        update(whole, write_paragraphs(Path(work) / "whole"))
        update(half, write_paragraphs(Path(work) / "half", even_only=True))
        for k in (5, 10, 20, 60):
            for weight in (0.3, 0.5, 0.7, 1.0):
                searching.RRF_K, searching.VECTOR_WEIGHT = k, weight
                asked = questions("fitting", 600)
                hits = [any(p.document == q.file for p in search(whole, q.question).passages) for q in asked]
                print(f"k {k}, weight of vectors {weight}: recall@5 {np.mean(hits):.3f}")
        searching.RRF_K, searching.VECTOR_WEIGHT = 10, 0.7
        values, labels = [], []
        for q in questions("fitting", 1000):
            passages = search(half, q.question).passages
            values.append([max(p.cosine for p in passages), max(p.coverage for p in passages)])
            labels.append(float(q.even))
        model, unseen = fit(("cosine", "coverage"), np.array(values), np.array(labels), penalty=1e-3)
        slopes = np.array(model.weights) / np.array(model.spread) * model.scale
        b0 = model.scale * model.intercept + model.shift - slopes @ np.array(model.mean)
        answerable = np.sort(unseen[np.array(labels) == 1])
        print(f"relevance: b = {b0:.1f}, {slopes[0]:.1f}, {slopes[1]:.1f}")
        print(f"threshold: {answerable[len(answerable) // 20]:.2f}")


if __name__ == "__main__":
    main()
