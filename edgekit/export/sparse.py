"""Calibrate sparse attention: in which channels the keys of each head are coded.

The NumPy forward reads a text. Queries and keys of each key-value head, of the text's tokens, are turned to positions
spread over the whole context, (n, d) each. With mu the mean of the keys, A the mean of (k - mu)(k - mu)^T, B that of
q q^T over the group's query heads, plus a hundredth of its mean diagonal for safety, and S = B^(1/4):

    S A S = V L V^T, eigenvalues falling        E_c = (H V^T S)_c / s_c        D_c = (H V^T S^-1)_c s_c

for the channels c that have codes: q . (k - mu) = sum_c (D q)_c (E (k - mu))_c, but for what the others hold. H mixes
each run of sixteen channels by a Hadamard matrix, which makes them alike and outliers rare; s_c is the step for which
the mean squared error of a normal variable's code is least. Powers of B between 0 (the keys' own principal channels)
and 1/2 (the largest share of the logits) do better than either, since few queries say little about a whole B.

Where the text's tokens really stood, slow channels have hardly turned: their mean would be right for the beginning of a
context and wrong for its end (docs/log.md). Without a text the model writes one itself, at temperature 1 from a fixed
seed: no data is needed, and the keys are those that the model meets when it speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.cache_rows import hadamard
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.kernels import sparse
from edgekit.kernels.attention import rotated
from edgekit.model.reference import watch_heads
from edgekit.model.rope import tables
from edgekit.runtime.engine import Engine
from edgekit.runtime.sampling import Sampler, Sampling
from edgekit.weight import Floats

TOKENS = 2048  # of a calibration text
WRITTEN = 1024  # where the model writes it
FEWEST = 256
PREFILL_BUDGET = 2048  # far positions that a tile of a prompt attends to, where prompts are read sparsely
STEPS = (0.3352, 0.9957)  # of 4-bit and 2-bit codes of a normal variable, in deviations: Max, IRE Trans. IT-6 (1960)


@dataclass(frozen=True)
class SparseOptions:
    """Sparse attention as an export asks for it.

    budget: positions that a token attends to exactly, unless the runtime is told otherwise. recent and sinks: the
    newest and first positions, which are always among them. followers: how many further positions count with their own
    values, but estimated weights. dense_layers: layers at the beginning that stay exact. wide_layers: the first of the
    others, which look nearly everywhere and have a budget of `wide_budget` at least.
    dense_below: contexts up to this length are attended exactly. per_query_head: each query head selects for itself,
    not its group together. prefill_budget: how many far positions
    prompts are read with, by blocks of 64; 0: all. Raises UserError for a value out of range.
    """

    budget: int = 256
    recent: int = 32
    sinks: int = 4
    followers: int = 192
    dense_layers: int = 0
    wide_layers: int = 2
    wide_budget: int = 1024
    dense_below: int = 1024
    per_query_head: bool = False
    adamas: bool = False
    prefill_budget: int = 0

    @classmethod
    def as_published(cls, *, budget: int = 256, dense_below: int = 1024) -> SparseOptions:
        """Adamas: the newest position and those of the nearest codes, for each query head, and nothing else."""
        return cls(
            budget=budget,
            recent=1,
            sinks=0,
            followers=0,
            dense_below=dense_below,
            dense_layers=2,
            wide_layers=0,
            per_query_head=True,
            adamas=True,
        )

    def __post_init__(self) -> None:
        positive = ("budget", "recent", "wide_budget")
        others = ("sinks", "followers", "dense_layers", "wide_layers", "dense_below", "prefill_budget")
        for name in (*positive, *others):
            least = int(name in positive)
            value = getattr(self, name)
            if not least <= value <= 1 << 20:
                raise UserError(f"{name} of sparse attention must be from {least} to {1 << 20}: got {value}")
        if self.adamas and self.followers:
            raise UserError(
                f"followers must be 0 with adamas, which drops what it does not select: got {self.followers}"
            )


@dataclass(frozen=True)
class KeyCode:
    """Of one layer: center (kv_heads, d), encoder E^T and decoder D^T (kv_heads, d, coded channels), float32. For
    adamas the center holds the thresholds (kv_heads, 2) of queries and keys, and the others nothing."""

    center: Floats
    encoder: Floats
    decoder: Floats


def written_text(engine: Engine, prompt: Sequence[int], *, tokens: int) -> list[int]:
    """`tokens` tokens that the model writes after `prompt`, at temperature 1; always the same."""
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    ids = list(prompt)
    logits = engine.forward(ids)
    while len(ids) < tokens:
        ids.append(sampler(logits[-1], ids))
        logits = engine.forward(ids[-1:])
    return ids


def calibrate(checkpoint: Checkpoint, ids: Sequence[int], *, context: int, adamas: bool = False) -> list[KeyCode]:
    """The codes of every layer, from a text's tokens, for a context of `context` positions.

    Raises UserError when they are too few, ModelError when keys are not numbers or all alike.
    """
    if len(ids) < FEWEST:
        raise UserError(f"a calibration text must have at least {FEWEST} tokens: this one has {len(ids)}")
    found = []
    position = np.random.default_rng(0).permutation(len(ids)) * (context // len(ids))

    def watch(layer: int, q: Floats, k: Floats) -> None:
        cos, sin = tables(checkpoint.decoder.rope, k.shape[2], context)
        q, k = (rotated(x[:, 1:], cos[position[1:]], sin[position[1:]]) for x in (q, k))  # the first token is a sink
        differ = bool((k.std(axis=1) > 0).any(axis=1).all())
        if not (differ and np.isfinite(k).all() and np.isfinite(q).all()):
            raise ModelError(f"keys must be numbers that differ: those of layer {layer} are not; is the model damaged?")
        groups = q.reshape(len(k), -1, q.shape[2])  # the queries of each key-value head
        make = thresholds if adamas else key_code
        found.append(KeyCode(*map(np.stack, zip(*map(make, groups, k), strict=True))))

    watch_heads(checkpoint, ids, watch)
    return found


def key_code(q: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
    """mu (d,), E^T and D^T (d, coded channels) of one key-value head, from queries (m, d) and keys (n, d)."""
    d = k.shape[1]
    fine, coded = sparse.fine_channels(d), sparse.coded_channels(d)
    center = k.mean(0, dtype=np.float64)
    centred, queries = k - center, q.astype(np.float64)
    weight = queries.T @ queries / len(q)
    strength, axes = np.linalg.eigh(weight + 1e-2 * np.trace(weight) / d * np.eye(d))
    root = axes * strength**0.25 @ axes.T
    spread, channels = np.linalg.eigh(root @ (centred.T @ centred / len(k)) @ root)
    spread, channels = np.maximum(spread[::-1], 1e-12 * spread[-1]), channels[:, ::-1]
    mix = hadamard(np.eye(sparse.RUN, dtype=np.float32))
    encoder = channels.T @ root
    decoder = channels.T @ (axes * strength**-0.25 @ axes.T)
    encoder, decoder = ((mix @ x.reshape(-1, sparse.RUN, d)).reshape(d, d)[:coded] for x in (encoder, decoder))
    deviation = np.sqrt(spread.reshape(-1, sparse.RUN).mean(1)).repeat(sparse.RUN)[:coded]
    step = np.where(np.arange(coded) < fine, *STEPS) * deviation
    return (
        center.astype(np.float32),
        (encoder / step[:, None]).T.astype(np.float32),
        (decoder * step[:, None]).T.astype(np.float32),
    )


def thresholds(q: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
    """The thresholds of Adamas's codes, from queries (m, d) and keys (n, d) of a key-value head, and nothing twice."""
    half = [0.5 * hadamard(x).std() for x in (q, k)]
    return np.array(half, np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32)
