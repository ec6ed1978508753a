"""The encoder's graph, built node by node over our operators, and its export to a bundle.

    QuantEmbedding + positions, norm                    then in each layer
    QuantLinear            q, k and v in one matrix
    MultiHeadAttention     onnxruntime's own, over all tokens of the text
    QuantLinear            output projection, bias and the residual; norm
    QuantLinear            up, then gelu
    QuantLinear            down, bias and the residual; norm

    input_ids (texts, tokens) int64 -> states (texts, tokens, hidden) float32

There is no mask: all texts of a run have the same number of tokens (`edgekit.runtime.embeddings` groups them so), hence
nothing is computed for padding. A matrix that is not quantised is a MatMul. The model carries our operators' meaning as
functions too, so stock onnxruntime runs it, slower.

Why built and not traced: the built graph runs on the kernels, needs no torch, and is faster than what tracing gives
(docs/encoders.md). An encoder of another family can be exported to ONNX by its own tools, and be compressed as a file
(`edgekit.export.onnx_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tokenizers import Tokenizer

from edgekit.bundle import MODEL, SPEC, WEIGHTS, EncoderSpec
from edgekit.checkpoint import Checkpoint, refuse_overlap
from edgekit.errors import ModelError, UserError
from edgekit.export.graph import Graph
from edgekit.export.record import write_manifest
from edgekit.export.targets import Target
from edgekit.folder import new_folder
from edgekit.kernels.functions import function_bodies
from edgekit.kernels.opset import DOMAIN, OPS
from edgekit.kernels.pack import tile
from edgekit.manifest import Manifest
from edgekit.model.encoder_config import EncoderConfig, encoder_config
from edgekit.model.encoder_reference import states
from edgekit.report import Measurement
from edgekit.runtime.embeddings import Encoder, StaticEncoder, pooled
from edgekit.runtime.providers import Choice
from edgekit.weight import Floats, Quantized, concatenate

TEXTS = (
    "The capital of France is Paris.",
    "Water boils at one hundred degrees Celsius because its vapour pressure then equals the pressure of the air.",
    "How do I reset the router after a power cut?",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "In 1969, two astronauts walked on the Moon while a third one waited in orbit around it. " * 4,
)
FLOAT_BOUND = 1e-5  # largest difference of a pooled number, relative to the vector's length
COSINE_BOUND = 0.999  # of quantised weights in the graph against the same weights in NumPy


def export_encoder(
    checkpoint: Checkpoint,
    output: Path,
    *,
    target: Target,
    force: bool = False,
    accept_drift: bool = False,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Write an encoder bundle to `output`; `on_progress` is told each stage.

    Raises UserError for a bad request, ModelError for weights that do not fit or a graph that does not agree with
    them (`accept_drift` lets that pass and records the numbers); nothing is left at `output` then.
    """
    config = encoder_config(checkpoint.config)
    if "tokenizer.json" not in checkpoint.assets:
        raise UserError(
            f"a bundle needs tokenizer.json: {checkpoint.source.name} has none; save a fast tokenizer with it"
        )
    refuse_overlap(checkpoint, output)
    with new_folder(output, force=force) as folder:
        on_progress("building the graph")
        native = build_encoder(checkpoint, folder)
        spec = EncoderSpec(
            architecture=config.architecture,
            target=target.name,
            vocabulary=config.vocabulary,
            max_length=config.max_length,
            dim=config.hidden_size,
            pooling=config.pooling,
            normalize=config.normalize,
            resident_bytes=(folder / WEIGHTS).stat().st_size,
            activation_bytes=4 * (6 * config.hidden_size + 2 * config.mlp),
            operators="edgekit" if native else "stock",
        )
        (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
        for name, content in checkpoint.assets.items():
            (folder / name).write_bytes(content)
        on_progress("checking it against the NumPy forward")
        measured = check_encoder(checkpoint, folder, spec, accept_drift=accept_drift)
        on_progress("writing digests")
        return write_manifest(checkpoint, folder, measured)


def build_encoder(checkpoint: Checkpoint, folder: Path) -> bool:
    """Write model.onnx and its weights; whether operators of ours are in it. Raises ModelError: weights do not fit."""
    config = encoder_config(checkpoint.config)
    refuse_misfits(checkpoint, config)
    with Graph(folder) as graph:
        _Encoder(checkpoint, config, graph).build()
    return bool(checkpoint.structure)


def refuse_misfits(checkpoint: Checkpoint, config: EncoderConfig) -> None:
    """Raise ModelError unless every weight is there, fits, and has a place."""
    hidden, mlp = config.hidden_size, config.mlp
    matrices = {"model.embed_tokens": (config.vocabulary, hidden)}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.positions": (config.positions, hidden)}
    norms = ["model.embed_tokens.norm"]
    for index in range(config.layers):
        layer = f"model.layers.{index}"
        square = {f"{layer}.self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        widths = {**square, f"{layer}.mlp.up_proj": (mlp, hidden), f"{layer}.mlp.down_proj": (hidden, mlp)}
        matrices |= widths
        tensors |= {f"{module}.bias": (shape[0],) for module, shape in widths.items()}
        norms += [f"{layer}.attention_norm", f"{layer}.output_norm"]
    tensors |= {f"{norm}.{leaf}": (hidden,) for norm in norms for leaf in ("weight", "bias")}
    for module, size in matrices.items():
        _expect(module, checkpoint.shape(module), size)
    for name, wanted in tensors.items():
        if not checkpoint.has(name):
            raise ModelError(f"the model must have {name}: its weights lack it")
        _expect(name, checkpoint.tensors.shape(name), wanted)
    if checkpoint.has("model.embed_tokens.types"):
        types = checkpoint.tensors.shape("model.embed_tokens.types")
        _expect("model.embed_tokens.types", types[1:], (hidden,))
    known = {*matrices, *tensors, "model.embed_tokens.types"}
    for found, vectors in checkpoint.blocks.values():
        for name in (*found, *vectors):
            if name not in known:
                raise ModelError(
                    f"every weight must have a place in the graph: {name} has none in {config.architecture} with"
                    f" {config.layers} layers"
                )


def _expect(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(shape) != tuple(wanted):
        raise ModelError(f"the weights must fit each other: {name} has shape {shape}, the model needs {wanted}")


class _Encoder:
    """The flow of the graph: which node reads which. Nodes are named by module path."""

    def __init__(self, checkpoint: Checkpoint, config: EncoderConfig, graph: Graph) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.graph = graph

    def build(self) -> None:
        state = self.embed()
        for index in range(self.config.layers):
            layer = f"model.layers.{index}"
            mixed = self.attend(f"{layer}.self_attn", state)
            state = self.norm(f"{layer}.attention_norm", self.linear([f"{layer}.self_attn.o_proj"], mixed, state))
            wide = self.graph.node("Gelu", [self.linear([f"{layer}.mlp.up_proj"], state)], f"{layer}.mlp.act")
            last = "states" if index + 1 == self.config.layers else ""
            total = self.linear([f"{layer}.mlp.down_proj"], wide, state)
            state = self.norm(f"{layer}.output_norm", total, output=last)
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["texts", "tokens"])]
        dims = ["texts", "tokens", self.config.hidden_size]
        outputs = [helper.make_tensor_value_info("states", TensorProto.FLOAT, dims)]
        functions: list[onnx.FunctionProto] = function_bodies() if self.checkpoint.structure else []
        self.graph.save(inputs, outputs, title=self.config.architecture, functions=functions)

    def embed(self) -> str:
        graph, module = self.graph, "model.embed_tokens"
        weight = self.checkpoint.weight(module)
        if isinstance(weight, Quantized):
            words = self.quantized("QuantEmbedding", {"ids": "input_ids"}, module, weight)
        else:
            table = graph.constant(f"{module}.weight", weight.dense())
            words = graph.node("Gather", [table, "input_ids"], module, axis=0)
        # The first rows of the position table, as many as there are tokens.
        positions = graph.constant(f"{module}.positions", position_table(self.checkpoint, self.config))
        zero, one = graph.constant("zero", np.array([0], np.int64)), graph.constant("one", np.array([1], np.int64))
        count = graph.node("Shape", ["input_ids"], f"{module}.tokens", start=1, end=2)
        rows = graph.node("Slice", [positions, zero, count, zero, one], f"{module}.positions_of")
        return self.norm(f"{module}.norm", graph.node("Add", [words, rows], f"{module}.sum"))

    def attend(self, prefix: str, state: str) -> str:
        joined = self.linear([f"{prefix}.{x}_proj" for x in "qkv"], state)
        parts = [f"{prefix}.{x}" for x in "qkv"]
        self.graph.node("Split", [joined], f"{prefix}.split", outputs=parts, axis=2, num_outputs=3)
        return self.graph.contrib("MultiHeadAttention", parts, prefix, num_heads=self.config.heads)

    def norm(self, module: str, x: str, *, output: str = "") -> str:
        parts = [self.vector(f"{module}.{leaf}") for leaf in ("weight", "bias")]
        return self.graph.node(
            "LayerNormalization",
            [x, *parts],
            module,
            outputs=[output or module],
            axis=-1,
            epsilon=self.config.norm_eps,
        )

    def linear(self, modules: Sequence[str], x: str, residual: str = "") -> str:
        """x W^T + bias, and the residual where there is one; the matrices of several modules stand side by side."""
        name = modules[0] if len(modules) == 1 else f"{modules[0]}.joined"
        weights = [self.checkpoint.weight(module) for module in modules]
        joined = concatenate(weights)
        if joined is None:
            products = [self.linear([module], x) for module in modules]
            return self.graph.node("Concat", products, name, axis=-1)
        values = np.concatenate([self.checkpoint.vector(f"{module}.bias") for module in modules])
        bias = self.graph.constant(f"{name}.bias", values)
        if isinstance(joined, Quantized):
            fed = {"x": x, "bias": bias, "residual": residual or self.nothing()}
            return self.quantized("QuantLinear", fed, name, joined)
        table = self.graph.constant(f"{name}.weight", joined.dense().T)
        product = self.graph.node("MatMul", [x, table], name)
        total = self.graph.node("Add", [product, bias], f"{name}.add")
        return self.graph.node("Add", [total, residual], f"{name}.sum") if residual else total

    def quantized(self, op: str, others: Mapping[str, str], name: str, weight: Quantized) -> str:
        """One of our operators over a quantised matrix; `others` are its inputs beside the matrix, by name."""
        tiles = tile(weight)
        leaves = ("codes", "scales", "zeros", "minima", "steps")
        held: dict[str, NDArray[Any]] = dict(zip(leaves, tiles.constants(), strict=True))
        fed = {leaf: self.graph.constant(f"{name}.{leaf}", values) for leaf, values in held.items()}
        fed |= others
        return self.graph.node(
            op,
            [fed[place] for place in OPS[op].inputs],
            name,
            domain=DOMAIN,
            N=tiles.rows,
            K=tiles.columns,
            bits=tiles.bits,
            block=tiles.block,
        )

    def vector(self, name: str) -> str:
        return self.graph.constant(name, self.checkpoint.vector(name))

    def nothing(self) -> str:
        return self.graph.constant("nothing", np.zeros(1, np.float32))


def position_table(checkpoint: Checkpoint, config: EncoderConfig) -> Floats:
    """What each position adds to its token, (max_length, hidden): its row of the table, and the first token type."""
    table = checkpoint.vector("model.embed_tokens.positions")
    rows = table[config.position_offset : config.position_offset + config.max_length]
    if checkpoint.has("model.embed_tokens.types"):
        rows = rows + checkpoint.vector("model.embed_tokens.types")[0]
    return rows


# --- the check --------------------------------------------------------------------------------------------------------


def check_encoder(
    checkpoint: Checkpoint, folder: Path, spec: EncoderSpec, *, accept_drift: bool = False
) -> tuple[Measurement, ...]:
    """Compare the graph's embeddings of `TEXTS` with the NumPy forward's. Raises ModelError beyond the bounds."""
    config = encoder_config(checkpoint.config)
    cpu = Choice("onnxruntime CPU")
    encoder = (
        StaticEncoder(folder, spec, threads=1, choice=cpu) if spec.static else Encoder(folder / MODEL, spec, threads=1)
    )
    sequences = token_ids(checkpoint, spec)
    cosines, drifts = [], []
    for ids in sequences:
        row = np.array([ids], np.int64)
        expected = pooled(states(checkpoint, config, row), spec)[0]
        got = pooled(encoder.run(row), spec)[0]
        length = float(np.linalg.norm(expected)) * float(np.linalg.norm(got))
        cosines.append(float(expected @ got) / length if length else float("nan"))
        drifts.append(float(np.abs(expected - got).max() / np.linalg.norm(expected)))
    cosine, drift = float(np.min(cosines)), float(np.max(drifts))
    if not np.isfinite(cosine):
        raise ModelError(f"embeddings must be finite and not zero: a cosine is {cosine}; the weights are damaged")
    rounds = spec.operators == "edgekit" or spec.static is not None
    wrong = cosine < COSINE_BOUND if rounds else drift > FLOAT_BOUND
    if wrong and not accept_drift:
        raise ModelError(
            f"the exported graph must agree with the checkpoint: lowest cosine {cosine:.6f} (bound"
            f" {COSINE_BOUND:g}), largest difference {drift:.2g} over {len(sequences)} texts; nothing was written; pass"
            " --accept-drift to have it all the same"
        )
    return (
        Measurement("parity: lowest cosine to the NumPy forward", cosine, "", n=len(sequences)),
        Measurement("parity: largest difference, relative", drift, "", n=len(sequences)),
    )


def token_ids(checkpoint: Checkpoint, spec: EncoderSpec) -> list[list[int]]:
    """The tokens of `TEXTS`. Raises ModelError: the tokenizer does not fit the model."""
    try:
        tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        sequences = [tokenizer.encode(text).ids[: spec.max_length] for text in TEXTS]
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as problem:  # the library raises plain Exception
        raise ModelError(f"tokenizer.json of {checkpoint.source.name} must be a tokenizer: {problem}") from problem
    if highest >= spec.vocabulary:
        raise ModelError(f"token ids must be below the embedding's {spec.vocabulary} rows: the tokenizer has {highest}")
    found = [ids for ids in sequences if ids]
    if not found:
        raise ModelError("the tokenizer must make tokens of English text: tokenizer.json gives none; is it damaged?")
    return found
