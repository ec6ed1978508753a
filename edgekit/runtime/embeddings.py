"""Text embeddings from an encoder bundle.

    embedder = Embedder.open("small.x86")
    vectors = embedder.embed(["a text", "another text"])        # (2, dim) float32

The states x_1 ... x_T of a text's tokens become one vector as the model was trained: their mean or the first of them,
divided by its length where the model says so. Texts run in groups of equally many tokens, so there is no padding, no
mask, and a text's neighbours do not change its result but for one thing: in a bundle with quantised weights, the
kernels round activations to 15 bits in runs of up to 64 tokens and to 8 bits, or with AMX to bfloat16, in longer
ones (docs/encoders.md).

A text of more tokens than the model takes is refused, unless cutting is asked for; then the result says which were cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekit.bundle import MODEL, EncoderBundle, EncoderSpec
from edgekit.errors import BudgetError, DeviceError, ModelError, UserError
from edgekit.host import host_device
from edgekit.kernels import library
from edgekit.profile.memory import available_bytes
from edgekit.runtime.budget import BASE_BYTES
from edgekit.runtime.providers import Choice, Processor, choose
from edgekit.runtime.static import compiled_name, load_graph, padded_text

Floats = NDArray[np.float32]
RUN_TOKENS = 2048  # tokens of one run: more cost memory and bring no speed (docs/encoders.md)


@dataclass(frozen=True)
class Embeddings:
    """Vectors (n, dim) float32 of n texts, the tokens that each has, and the indices of those that were cut.

    `tokens` counts what the text has, special tokens included, before any cut.
    """

    vectors: Floats
    tokens: tuple[int, ...]
    truncated: tuple[int, ...]


class Encoder:
    """An onnxruntime session of an encoder's graph. `kernels` is the path of our kernels that runs, or "stock"."""

    def __init__(self, model: Path, spec: EncoderSpec, *, threads: int) -> None:
        """Load the graph. Raises DeviceError when onnxruntime refuses it."""
        self.threads = threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised as well
        wanted = spec.operators == "edgekit"
        native = wanted and library.register(options, decode_threads=threads, prefill_threads=threads)
        self.kernels = library.path_name() or "stock" if native else "stock"
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # onnxruntime raises classes of its own, with no common base
            raise DeviceError(f"onnxruntime {ort.__version__} cannot run {model}: {_first_line(problem)}") from problem

    def run(self, ids: NDArray[np.int64]) -> Floats:
        """States (texts, tokens, hidden) of ids (texts, tokens). Raises DeviceError when onnxruntime stops."""
        try:
            states: Floats = self._session.run(None, {"input_ids": ids})[0]
        except Exception as problem:
            raise DeviceError(f"onnxruntime stopped at {ids.shape} tokens: {_first_line(problem)}") from problem
        return states


class StaticEncoder:
    """The same over a graph of one padded text, on what was chosen. `reason` says why it is not an NPU."""

    def __init__(self, folder: Path, spec: EncoderSpec, *, threads: int, choice: Choice) -> None:
        """Load the graph. Raises DeviceError when onnxruntime or the provider refuses it."""
        assert spec.static is not None
        self.threads, self.static = threads, spec.static
        self.kernels, self.reason = str(choice), choice.reason
        compiled = bool(choice.devices) and spec.static.compiled is not None
        self._session = load_graph(
            folder / (compiled_name(MODEL) if compiled else MODEL), threads, choice, as_it_is=compiled
        )

    def run(self, ids: NDArray[np.int64]) -> Floats:
        """As `Encoder.run`, text by text."""
        states = []
        for row in ids.tolist():
            feeds = padded_text(row, length=self.static.chunk, hidden=self.static.hidden)
            try:
                states.append(self._session.run(["states"], feeds)[0][0, : len(row)])
            except Exception as problem:
                raise DeviceError(f"onnxruntime stopped at {ids.shape} tokens: {_first_line(problem)}") from problem
        return np.array(states)


class Embedder:
    """A loaded encoder bundle. Safe for use by several threads at once, which then share its cores."""

    def __init__(self, spec: EncoderSpec, encoder: Encoder | StaticEncoder, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.encoder = encoder
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None, processor: Processor = "auto") -> Embedder:
        """Open an encoder bundle. `threads` defaults to the cores that this machine has for it, `processor` says where
        a bundle for an NPU runs: see `edgekit.runtime.providers`.

        Raises UserError or ModelError for a bad bundle, BudgetError before loading when memory does not suffice.
        """
        bundle = EncoderBundle.open(Path(path))
        if threads is not None and threads < 1:
            raise UserError(f"--threads must be at least 1: got {threads}")
        _refuse_if_too_large(bundle.spec)
        tokenizer = _tokenizer(bundle)
        cores = threads or host_device().threads or 1
        if (static := bundle.spec.static) is not None:
            bundle.file(compiled_name(MODEL) if static.compiled else MODEL)
            choice = choose(static.provider, processor)
            return cls(bundle.spec, StaticEncoder(bundle.path, bundle.spec, threads=cores, choice=choice), tokenizer)
        if processor != "auto":
            raise UserError(f"--processor is for bundles of an NPU: {path} is for {bundle.spec.target}")
        return cls(bundle.spec, Encoder(bundle.file(MODEL), bundle.spec, threads=cores), tokenizer)

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.spec.dim

    @property
    def max_length(self) -> int:
        """The most tokens of a text, special ones included."""
        return self.spec.max_length

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, special ones included: what `max_length` bounds."""
        return [len(ids) for ids in self._encode(texts)]

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Floats:
        """Vectors (n, dim) float32 of n texts, in their order; `encode` says more. Raises UserError as it does."""
        return self.encode(texts, truncate=truncate).vectors

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> Embeddings:
        """Embed texts. With `truncate`, texts that are too long lose their end, and the result names them.

        Raises UserError: a text is too long, and `truncate` is not set; or what is passed is one text and no list.
        """
        if isinstance(texts, str):
            raise UserError("embed takes a list of texts: got one text; put it in a list")
        rows = self._encode(texts)
        tokens = tuple(len(ids) for ids in rows)
        limit = self.spec.max_length
        truncated = tuple(index for index, count in enumerate(tokens) if count > limit)
        if truncated and not truncate:
            raise UserError(
                f"a text must have at most {limit} tokens: number {truncated[0]} of {len(rows)} (counted from 0) has"
                f" {tokens[truncated[0]]}; split it, or pass truncate (--truncate) to embed its beginning"
            )
        for index in truncated:
            rows[index] = self._cut(rows[index])
        vectors = np.empty((len(rows), self.spec.dim), np.float32)
        for group in groups([len(ids) for ids in rows], most=RUN_TOKENS):
            states = self.encoder.run(np.array([rows[index] for index in group], np.int64))
            vectors[group] = pooled(states, self.spec)
        return Embeddings(vectors, tokens, truncated)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"a text must be a string: number {index} is {type(text).__name__}")
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        for index, ids in enumerate(rows):
            if not ids:
                raise UserError(
                    f"a text must give tokens: the tokenizer makes none of number {index}, {texts[index]!r:.60}"
                )
            if max(ids) >= self.spec.vocabulary:
                raise ModelError(f"token ids must be below {self.spec.vocabulary}: the tokenizer gives {max(ids)}")
        return rows

    def _cut(self, ids: list[int]) -> list[int]:
        """The beginning of a text, with the special tokens that end it."""
        added = self.tokenizer.num_special_tokens_to_add(False)
        ending = added // 2  # [CLS] text [SEP]: as many after the text as before it
        limit = self.spec.max_length
        return ids[:limit] if ending == 0 or ending >= limit else ids[: limit - ending] + ids[-ending:]


def groups(lengths: Sequence[int], *, most: int) -> Iterator[list[int]]:
    """Indices of texts of the same length, in groups of at most `most` tokens (and at least one text)."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    group: list[int] = []
    for index in order:
        length = lengths[index]
        if group and (lengths[group[0]] != length or (len(group) + 1) * length > most):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def pooled(states: Floats, spec: EncoderSpec) -> Floats:
    """One vector for each text, (texts, dim), from states (texts, tokens, dim)."""
    vectors: Floats = states[:, 0] if spec.pooling == "cls" else states.mean(axis=1, dtype=np.float32)
    if not spec.normalize:
        return vectors
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.maximum(length, np.float32(1e-12))  # the bound is torch's: zero stays zero
    return unit


def cosines(vectors: Floats) -> Floats:
    """The cosine of each of the vectors (n, dim) with the first, (n,); 0 where one of them is zero."""
    lengths = np.linalg.norm(vectors, axis=1)
    products = np.maximum(lengths * lengths[0], np.finfo(np.float32).tiny)
    found: Floats = (vectors @ vectors[0] / products).astype(np.float32)
    return found


def _refuse_if_too_large(spec: EncoderSpec) -> None:
    needed = BASE_BYTES + spec.resident_bytes + spec.activation_bytes * max(RUN_TOKENS, spec.max_length)
    available = available_bytes()
    if available is not None and needed > available:
        raise BudgetError(
            f"the encoder must fit in memory: it needs {needed / 1e6:,.0f} MB, {available / 1e6:,.0f} MB are available;"
            " close other programs, or use a smaller model"
        )


def _tokenizer(bundle: EncoderBundle) -> Tokenizer:
    path = bundle.file("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # the file may say that texts are cut: that is ours to decide, and to report
        tokenizer.no_padding()
    except Exception as problem:  # the library raises plain Exception
        raise ModelError(f"{path} must be a tokenizer: {problem}; export the bundle again") from problem
    return tokenizer


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return text[0][:300] if text else type(problem).__name__
