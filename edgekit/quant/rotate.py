"""The step `quant.rotate`: turn the residual stream so that no channel stands out, without changing the model.

With an orthogonal Q, the stream h becomes h Q. RMSNorm commutes with that once its gain g is folded into the matrices
that read it, because |h Q| = |h|. For y = W x with W: (out, in):

    norm gain g                     g = 1                 folded away
    q, k, v, gate, up, head         W' = (W diag(g)) Q    they read the normed stream
    o, down                         W' = Q^T W            they write to the stream
    token table E: (vocabulary, d)  E' = E Q              its rows are the stream

Large weights of single channels are spread over all of them, which makes blocks easier to round. The logits are the
same to float rounding. A head that is tied to the table becomes a matrix of its own, since only the head takes the
final gain; it stays tied where that gain is one. Quantised matrices are made float by this step: put it first.

Q is a randomised Hadamard matrix diag(signs) H / sqrt(d) where d is a power of two, else the Q of a Gaussian matrix's
QR factorisation with signs fixed (Haar distributed). It depends on the seed, NumPy's random stream and LAPACK.
Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4, stage 1a. We do not rotate inside heads or at run time.
Not supported: layers whose norms read anything but the stream. q_norm and k_norm of Qwen 3 act within heads and stay.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError
from edgekit.step import Changes, Fact, MatrixOutline, Needs, Outline, Prediction, StepContext, renamed
from edgekit.weight import Dense, Floats, Weight

TABLE, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
READERS = {  # module of a layer -> the norm whose output it reads
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Rotate:
    """See the module. No options: the recipe's seed chooses the rotation."""

    name: ClassVar[str] = "quant.rotate"
    needs: ClassVar[Needs] = "weights"

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model itself, or the model with its head untied where the final norm's gain is not one."""
        if not checkpoint.decoder.tied:
            checkpoint.shape(HEAD)  # refuses a model that has none
            return checkpoint
        if (checkpoint.vector(f"{FINAL_NORM}.weight") == 1).all():
            return checkpoint
        names = {name: name for name in checkpoint.tensors.names()}
        table = [name for name in names if name.startswith(f"{TABLE}.")]
        head = {HEAD + name.removeprefix(TABLE): name for name in table}
        return renamed(checkpoint, names | head, config={**checkpoint.config, "tie_word_embeddings": False})

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The block in the turned stream, all of it float."""
        Q = rotation(context.decoder.hidden_size, context.seed)
        norms = {name: gain for name, gain in block.vectors.items() if _is_stream_norm(name)}
        prefix = f"model.{block.name}."
        matrices: dict[str, Weight] = {}
        peaks: list[tuple[float, float]] = []
        for module, weight in block.matrices.items():
            W, leaf = weight.dense(), module.removeprefix(prefix)
            if module == TABLE:
                turned = turn_inputs(W, None, Q)
            elif module == HEAD or leaf in READERS:
                norm = FINAL_NORM if module == HEAD else prefix + READERS[leaf]
                turned = turn_inputs(W, _gain(norms, norm, module), Q)
            elif leaf in WRITERS and f"{module}.bias" not in block.vectors:
                turned = turn_outputs(W, Q)
            else:
                raise ModelError(f"quant.rotate must know how each matrix meets the stream: it does not know {module}")
            matrices[module] = Dense(turned)
            peaks.append((_peak(W), _peak(turned)))
        vectors = {name: np.ones_like(v) if name in norms else v for name, v in block.vectors.items()}
        return Block(block.name, matrices, vectors), Changes(len(matrices), _facts(peaks))

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """Float matrices of the same shapes; the time is that of the products."""
        size = context.decoder.hidden_size
        weights = {module: matrix.shape[0] * matrix.shape[1] for module, matrix in outline.matrices.items()}
        matrices = {
            module: MatrixOutline(matrix.shape, 4 * weights[module], dense=True)
            for module, matrix in outline.matrices.items()
        }
        seconds = 2 * size * sum(weights.values()) / _operations_a_second()
        workspace = 3 * 8 * size**2 + 4 * size * CHUNK_ROWS
        return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, workspace)


@functools.lru_cache(maxsize=1)
def rotation(size: int, seed: int) -> Floats:
    """The orthogonal Q: (size, size) float32 of the module's text, with |Q^T Q - 1| <= 1e-5; read-only."""
    random = np.random.default_rng((seed, size))
    if size & (size - 1) == 0:
        Q = hadamard(size)
        Q *= random.choice(np.array([-1, 1], np.float32), size)[:, None] / np.sqrt(np.float32(size))
    else:
        factor, upper = np.linalg.qr(random.standard_normal((size, size)))
        Q = (factor * np.sign(np.diagonal(upper))).astype(np.float32)
    Q.flags.writeable = False
    return Q


def hadamard(size: int) -> Floats:
    """Sylvester's Hadamard matrix, (size, size) of +1 and -1; `size` is a power of two."""
    H = np.ones((1, 1), np.float32)
    while len(H) < size:
        H = np.block([[H, H], [H, -H]])
    return H


def turn_inputs(W: Floats, gain: Floats | None, Q: Floats) -> Floats:
    """(W diag(gain)) Q, for W: (out, in) that reads the stream of width in; a few rows at a time."""
    turned = np.empty_like(W)
    for start in range(0, len(W), CHUNK_ROWS):
        rows = W[start : start + CHUNK_ROWS]
        np.matmul(rows if gain is None else rows * gain, Q, out=turned[start : start + CHUNK_ROWS])
    return turned


def turn_outputs(W: Floats, Q: Floats) -> Floats:
    """Q^T W, for W: (out, in) that writes to the stream of width out."""
    return Q.T @ W


def _is_stream_norm(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module == FINAL_NORM or module.endswith((".input_layernorm", ".post_attention_layernorm"))


def _gain(norms: dict[str, Floats], norm: str, module: str) -> Floats:
    gain = norms.get(f"{norm}.weight")
    if gain is None:
        raise ModelError(f"quant.rotate needs the norm before {module}: the weights lack {norm}.weight")
    return gain


def _peak(W: Floats) -> float:
    """Largest weight over the root mean square of all: 1 for signs, about 5 for a large Gaussian matrix."""
    power = float(np.einsum("ij,ij->", W, W)) / max(W.size, 1)
    return float(max(W.max(), -W.min())) / power**0.5 if power else 0.0


def _facts(peaks: list[tuple[float, float]]) -> dict[str, Fact]:
    if not peaks:
        return {}
    before, after = (sum(column) / len(peaks) for column in zip(*peaks, strict=True))
    return {
        "peak_over_rms_before": Fact(before, "mean", len(peaks)),
        "peak_over_rms_after": Fact(after, "mean", len(peaks)),
    }


@functools.cache
def _operations_a_second() -> float:
    """Multiplications and additions a second of a float32 matrix product here."""
    A = np.ones((768, 768), np.float32)
    A @ A  # the first product starts BLAS's threads
    started = time.perf_counter()
    A @ A
    return 2 * float(768**3) / (time.perf_counter() - started)
