"""The engine: an onnxruntime session with the key-value cache of one sequence.

Keys and values live in buffers which the graph reads as its past and writes as its present, in place. They grow by a
quarter when the sequence does, up to the context: what is used of them stays close together, in huge pages where there
are any (`edgekit.runtime.pages`), and memory is taken as it is first written.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.bundle import BLOCK, DecoderSpec
from edgekit.errors import ContextOverflow, DeviceError, ModelError, UserError
from edgekit.kernels import library
from edgekit.runtime.budget import PREFILL_CHUNK
from edgekit.runtime.pages import LazyPages

JOIN_EVERY = 1024  # tokens after which pages of the cache may be joined
FIRST_CAPACITY = 1024  # tokens that the cache can hold before it grows


class Engine:
    """Feeds tokens and gives logits. Not safe for use by several threads at once.

    `tokens` are the tokens whose keys and values are in the cache; `context` is how many it can hold, and `capacity`
    how many before it grows; `run_seconds`
    adds up the time spent inside onnxruntime; `native` says whether our kernels run, and `kernels`
    which path of them, or "stock". `reason` is why it does not run on what the bundle is for: never here.
    """

    reason = ""

    def __init__(
        self,
        model: Path,
        spec: DecoderSpec,
        *,
        context: int,
        threads: int,
        decode_threads: int | None = None,
        budget: int | None = None,
        trace: Path | None = None,
    ) -> None:
        """Load the graph. `decode_threads` is for single tokens, where our kernels run, `budget` the one of sparse
        attention, `trace` how the file of `end_trace` begins.

        Raises DeviceError when onnxruntime refuses it or the cache cannot be had.
        """
        self.spec = spec
        self.context = context
        self.threads = threads
        self.tokens: list[int] = []
        self.capacity = 0
        self._cache: dict[str, tuple[NDArray[Any], ort.OrtValue]] = {}
        self._pages: LazyPages | None = None
        self.run_seconds = 0.0
        first = min(context, FIRST_CAPACITY)
        options = ort.SessionOptions()
        options.intra_op_num_threads = max(threads, decode_threads or 1)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised as well
        if trace is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(trace)
        wanted = spec.operators == "edgekit"
        decode = decode_threads or min(threads, spec.decode_threads or threads)
        self.native = wanted and library.register(
            options, decode_threads=decode, prefill_threads=threads, activations=spec.activations
        )
        self.kernels = library.path_name() or "stock" if self.native else "stock"
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            self._binding = self._session.io_binding()
            self._bind_cache(first)
            _return_memory()
        except MemoryError as problem:
            raise DeviceError(f"the cache of {first} tokens could not be had; use a smaller --context") from problem
        except Exception as problem:  # onnxruntime raises classes of its own, with no common base
            raise DeviceError(f"onnxruntime {ort.__version__} cannot run {model}: {_first_line(problem)}") from problem
        self._last = self._bind_scalar("seqlens_k", np.zeros(1, np.int32))
        self._total = self._bind_scalar("total_sequence_length", np.zeros((), np.int32))
        self._keep = self._bind_scalar("logits_to_keep", np.ones((), np.int64))
        if spec.sparse:
            self._budget = self._bind_scalar("budget", np.array([spec.budget if budget is None else budget], np.int32))
        self._bound = (0, 0)

    def forward(self, ids: Sequence[int], *, keep: int = 1) -> NDArray[np.float32]:
        """Append `ids` to the sequence; returns the logits after the last `keep` of them, (keep, vocabulary).

        There must be one id or more, and 1 <= keep <= len(ids). The array is overwritten by the next call. Raises
        ContextOverflow when the sequence would not fit; the cache is then as before.
        """
        assert 1 <= keep <= len(ids)
        if min(ids) < 0 or max(ids) >= self.spec.vocabulary:
            raise UserError(f"token ids must be from 0 to {self.spec.vocabulary - 1}: got {min(ids)} to {max(ids)}")
        needed = len(self.tokens) + len(ids)
        if needed > self.context:
            raise ContextOverflow(needed, self.context, self.spec.cache_bytes(needed))
        self.reserve(needed)
        parts = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            after = len(ids) - start - len(chunk)
            wanted = keep - after  # how many of the kept tokens lie in this chunk or before
            logits = self._run(chunk, keep=min(max(wanted, 1), len(chunk)))
            if wanted > 0:
                parts.append(logits.copy() if after else logits)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens, at most the context, and some more: until then the cache stays where it is.

        Raises DeviceError when the system has none.
        """
        if tokens > self.capacity:
            more = min(self.context, -(-(tokens + tokens // 4) // BLOCK) * BLOCK)
            try:
                self._bind_cache(more, tokens)
            except MemoryError as problem:
                raise DeviceError(f"the cache of {more} tokens could not be had; use a smaller --context") from problem

    def kept(self, length: int) -> dict[str, NDArray[Any]]:
        """What the cache holds of the first `length` tokens: views by name, (1, kv_heads, n, ...), n by `length`.

        They are good until tokens are added.
        """
        assert length <= len(self.tokens)
        return {name: buffer[:, :, : self._extent(name, length)] for name, (buffer, _) in self._cache.items()}

    def restore(self, tokens: Sequence[int], kept: Mapping[str, NDArray[Any]]) -> None:
        """Make `tokens` the sequence, of which `kept` came from an engine of the same graph.

        Raises ModelError when `kept` has other parts, shapes or types than this cache; the cache is then as before.
        """
        if len(tokens) > self.context:
            raise ModelError(f"a kept cache must fit in the context of {self.context}: it is of {len(tokens)} tokens")
        self.reserve(len(tokens))
        parts = {name: buffer[:, :, : self._extent(name, len(tokens))] for name, (buffer, _) in self._cache.items()}
        same = parts.keys() == kept.keys() and all(
            (part.shape, part.dtype) == (kept[name].shape, kept[name].dtype) for name, part in parts.items()
        )
        if not same:
            raise ModelError("a kept cache must be of the same bundle: this one is not")
        self.tokens.clear()  # an interrupt in the middle must not leave half of them valid
        for name, part in parts.items():
            part[...] = kept[name]
        self.tokens.extend(tokens)

    def _extent(self, name: str, tokens: int) -> int:
        """How much of a buffer's third axis `tokens` positions take."""
        index, part = name.split(".")
        return self.spec.cache_parts(self.spec.layers[int(index)], tokens)[part][0][2]

    @property
    def budget(self) -> int | None:
        """How many positions a token attends to exactly in sparse layers; None where there are none. It may be set."""
        return int(self._budget[0]) if self.spec.sparse else None

    @budget.setter
    def budget(self, positions: int) -> None:
        if not self.spec.sparse:
            raise UserError("a budget needs sparse attention: export with --attention sparse")
        if not 1 <= positions < 1 << 31:
            raise UserError(f"the budget of sparse attention must be at least 1: got {positions}")
        self._budget[0] = positions

    def end_trace(self) -> Path:
        """Stop taking the times of operators, which began with `trace`; returns onnxruntime's file of events."""
        return Path(self._session.end_profiling())

    def _run(self, ids: Sequence[int], *, keep: int) -> NDArray[np.float32]:
        if self._bound != (len(ids), keep):
            self._bound = (0, 0)  # an interrupt between the bindings must not leave half of them valid
            self._ids = self._bind_scalar("input_ids", np.zeros((1, len(ids)), np.int64))
            self._logits = np.empty((1, keep, self.spec.vocabulary), np.float32)
            self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
            self._bound = (len(ids), keep)
        total = len(self.tokens) + len(ids)
        if len(self.tokens) >= self._join_at:
            self._join(len(self.tokens))
        self._ids[0] = ids
        self._last[0], self._total[...], self._keep[...] = total - 1, total, keep
        clock = time.perf_counter()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as problem:
            raise DeviceError(f"onnxruntime stopped at token {total}: {_first_line(problem)}") from problem
        self.run_seconds += time.perf_counter() - clock
        self.tokens.extend(ids)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def _bind_scalar(self, name: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Bind an input to `values` itself: what is written there later is what the next run reads."""
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values))
        return values

    def _bind_cache(self, capacity: int, expected: int = 0) -> None:
        """Bind a cache of `capacity` tokens that holds what the last one held; `expected` tokens will soon be there."""
        parts = {
            f"{index}.{part}": form
            for index, layer in enumerate(self.spec.layers)
            for part, form in self.spec.cache_parts(layer, capacity).items()
        }
        before, self._pages = self._pages, LazyPages(parts)
        self._join(expected)
        tokens, self.tokens = self.tokens, []  # an interrupt in the middle must not leave half of them valid
        for name, buffer in self._pages.arrays.items():
            if before is not None:
                extent = self._extent(name, len(tokens))
                buffer[:, :, :extent] = self._cache[name][0][:, :, :extent]
                before.release(name)
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
            self._cache[name] = (buffer, value)
        self.tokens, self.capacity = tokens, capacity

    def _join(self, tokens: int) -> None:
        assert self._pages is not None
        self._pages.join({name: self._extent(name, tokens) for name in self._pages.arrays})
        self._join_at = tokens + JOIN_EVERY


def _return_memory() -> None:
    """Give back what loading has freed: without the kernels it folds constants of many times the model's size."""
    with contextlib.suppress(AttributeError):  # only the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return text[0][:300] if text else type(problem).__name__
