"""The engine of graphs with fixed shapes: prompts go through in padded pieces, answers token by token.

The cache lies on the host. A run reads all of it, what lies behind its end being masked, and gives the keys and values
of its own tokens, which are then put there. It offers what `edgekit.runtime.engine.Engine` does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.bundle import MODEL, PREFILL, DecoderSpec
from edgekit.errors import ContextOverflow, DeviceError, UserError
from edgekit.runtime.providers import Choice


class Decoder(Protocol):
    """What takes tokens and gives logits: this module's engine, or `edgekit.runtime.engine.Engine`."""

    spec: DecoderSpec
    tokens: list[int]
    context: int
    run_seconds: float

    def forward(self, ids: Sequence[int], *, keep: int = 1) -> NDArray[np.float32]: ...

    def rewind(self, length: int) -> None: ...


class StaticEngine:
    """Feeds tokens and gives logits. Not safe for use by several threads at once. Fields as in `Engine`."""

    native = False
    budget = None

    def __init__(
        self, folder: Path, spec: DecoderSpec, *, threads: int, choice: Choice, context: int | None = None
    ) -> None:
        """Load the graphs onto what was chosen. A smaller `context` is kept to, but saves nothing.

        Raises DeviceError when onnxruntime or the provider refuses them.
        """
        assert spec.static is not None
        self.spec = spec
        self.static = spec.static
        self.context = context or spec.context_length
        self.threads = threads
        self.tokens: list[int] = []
        self.run_seconds = 0.0
        self.kernels = str(choice)
        self.reason = choice.reason
        self._cache = {
            f"{index}.{part}": np.zeros((1, layer.kv_heads, spec.context_length, layer.head_dim), spec.cache_type)
            for index, layer in enumerate(spec.layers)
            for part in ("key", "value")
        }
        compiled = bool(choice.devices) and spec.static.compiled is not None
        self._graphs = {
            length: load_graph(folder / (compiled_name(file) if compiled else file), threads, choice, as_it_is=compiled)
            for length, file in ((1, MODEL), (self.static.chunk, PREFILL))
        }

    def forward(self, ids: Sequence[int], *, keep: int = 1) -> NDArray[np.float32]:
        """Append `ids`; returns the logits after the last `keep` of them, (keep, vocabulary). As `Engine.forward`."""
        assert 1 <= keep <= len(ids)
        if min(ids) < 0 or max(ids) >= self.spec.vocabulary:
            raise UserError(f"token ids must be from 0 to {self.spec.vocabulary - 1}: got {min(ids)} to {max(ids)}")
        needed = len(self.tokens) + len(ids)
        if needed > self.context:
            raise ContextOverflow(needed, self.context, self.spec.cache_bytes(needed))
        parts, start = [], 0
        while start < len(ids):
            length = 1 if len(ids) - start == 1 else self.static.chunk
            piece = ids[start : start + length]
            logits = self._run(piece, length)
            start += len(piece)
            wanted = keep - (len(ids) - start)  # how many of the kept tokens lie in this piece or before
            if wanted > 0:
                parts.append(logits[max(0, len(piece) - wanted) :])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]

    def _run(self, ids: Sequence[int], length: int) -> NDArray[np.float32]:
        past, count = len(self.tokens), len(ids)
        feeds = inputs(ids, past, length=length, context=self.spec.context_length, hidden=self.static.hidden)
        feeds |= {f"past.{name}": buffer for name, buffer in self._cache.items()}
        clock = time.perf_counter()
        try:
            logits, *new = self._graphs[length].run(["logits", *(f"new.{name}" for name in self._cache)], feeds)
        except Exception as problem:
            raise DeviceError(f"onnxruntime stopped at token {past + count}: {str(problem)[:300]}") from problem
        self.run_seconds += time.perf_counter() - clock
        for buffer, found in zip(self._cache.values(), new, strict=True):
            buffer[:, :, past : past + count] = found[:, :, :count]
        self.tokens.extend(ids)
        kept: NDArray[np.float32] = logits[0, :count]
        return kept


def inputs(ids: Sequence[int], past: int, *, length: int, context: int, hidden: float) -> dict[str, NDArray[Any]]:
    """All inputs but the cache for a run of `length` tokens, `ids` and padding, after `past` cached ones."""
    padded = np.zeros((1, length), np.int64)
    padded[0, : len(ids)] = ids
    mask = np.full((1, 1, length, context + length), -hidden, np.float32)
    mask[..., :past] = 0
    mask[..., context:][..., np.tri(length, dtype=bool)] = 0
    positions = np.minimum(past + np.arange(length), context - 1)
    return {"input_ids": padded, "positions": positions, "mask": mask}


def padded_text(ids: Sequence[int], *, length: int, hidden: float) -> dict[str, NDArray[Any]]:
    """The inputs of an encoder's graph of `length` tokens."""
    padded = np.zeros((1, length), np.int64)
    padded[0, : len(ids)] = ids
    mask = np.full((1, 1, 1, length), -hidden, np.float32)
    mask[..., : len(ids)] = 0
    return {"input_ids": padded, "mask": mask}


def compiled_name(file: str) -> str:
    """The file of a graph that was compiled for an NPU."""
    return file.replace(".onnx", ".qnn.onnx")


def load_graph(path: Path, threads: int, choice: Choice, *, as_it_is: bool = False) -> ort.InferenceSession:
    """A session over a graph; `as_it_is` keeps onnxruntime from rewriting it, after which QNN misses tensors by name.

    Raises DeviceError.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what fails is raised as well
    # onnxruntime would round activations to 8 bits before it multiplies; the graph says what is rounded.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if as_it_is:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    choice.apply(options)
    try:
        if choice.devices:
            return ort.InferenceSession(str(path), options)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime raises classes of its own, with no common base
        raise DeviceError(f"{choice} cannot run {path}: {str(problem).strip()[:300]}") from problem
