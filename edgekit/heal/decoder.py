"""The decoder of the Llama family as a torch module that reads every width from the weights.

It is `edgekit.model.reference` with gradients: layers may be missing, MLPs and heads narrower than those beside them,
matrices quantised. A layer's arithmetic is a pure function of its tensors, `layer_forward`, which can be compiled once
for all layers. The residual stream, norms and softmax stay float32; products run in the `dtype` that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError
from edgekit.heal.fake_quant import Levels
from edgekit.heal.matrix import AnyMatrix, trainable_matrix
from edgekit.model.config import DecoderConfig
from edgekit.model.heads import refuse_thin_heads
from edgekit.model.rope import tables

TABLE, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm.weight"
ROLES = {  # attribute -> the module's name in a layer
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {
    "before_attention": "input_layernorm.weight",
    "before_mlp": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
LevelsOf = Callable[[str], Levels | None]  # of a module path; None: stays float


class LayerTensors(NamedTuple):
    """What a layer computes with: matrices (out, in) in the dtype of the products, biases and gains."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    biases: dict[str, Tensor]
    gains: dict[str, Tensor]


class Layer(nn.Module):  # type: ignore[misc]
    """One decoder layer: a `Matrix` by role, biases, norms."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, *, levels: LevelsOf, fixed: bool, device: torch.device | None
    ) -> None:
        super().__init__()
        self.config = checkpoint.decoder
        self.dtype = torch.float32
        self.compute: Callable[..., Tensor] = layer_forward
        prefix = f"model.layers.{index}."
        for role, leaf in ROLES.items():
            path = prefix + leaf
            weight = checkpoint.weight(path)
            setattr(self, role, trainable_matrix(weight, levels=levels(path), fixed=fixed, device=device))
        self.biases = nn.ParameterDict(
            {
                role: _parameter(checkpoint.vector(f"{prefix}{leaf}.bias"))
                for role, leaf in ROLES.items()
                if checkpoint.has(f"{prefix}{leaf}.bias")
            }
        )
        self.gains = nn.ParameterDict(
            {
                name: _parameter(checkpoint.vector(prefix + leaf))
                for name, leaf in NORMS.items()
                if checkpoint.has(prefix + leaf)
            }
        )

    def matrices(self) -> dict[str, AnyMatrix]:
        """Role -> matrix."""
        return {role: getattr(self, role) for role in ROLES}

    def forward(self, state: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The stream after the layer; `state`: (sequences, T, hidden) float32."""
        weights = {role: matrix.weight().to(self.dtype) for role, matrix in self.matrices().items()}
        tensors = LayerTensors(**weights, biases=dict(self.biases.items()), gains=dict(self.gains.items()))
        config = self.config
        return self.compute(state, cos, sin, tensors, config.head_dim, config.norm_eps, config.sliding_window)

    def to_block(self, name: str, source: Block) -> Block:
        """The layer as it is to be written, by the names of `source`, the block that it was read from."""
        prefix = f"model.{name}."
        matrices = {prefix + ROLES[role]: matrix.fold() for role, matrix in self.matrices().items()}
        vectors = dict(source.vectors)
        vectors.update({f"{prefix}{ROLES[role]}.bias": _array(bias) for role, bias in self.biases.items()})
        vectors.update({prefix + NORMS[key]: _array(gain) for key, gain in self.gains.items()})
        return Block(name, matrices, vectors)


class Decoder(nn.Module):  # type: ignore[misc]
    """The whole model. `forward(ids)` gives the final normed states; `head()` the matrix that makes logits of them.

    Arguments: `levels` says onto which grid a float matrix is to be trained; `fixed` keeps the codes of quantised ones.
    Raises ModelError: a tensor is missing or of a shape that cannot be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        levels: LevelsOf = lambda path: None,
        fixed: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()

        def matrix(path: str) -> AnyMatrix:
            return trainable_matrix(checkpoint.weight(path), levels=levels(path), fixed=fixed, device=device)

        refuse_thin_heads(checkpoint, "healing")
        config = checkpoint.decoder
        self.config: DecoderConfig = config
        self.recompute = False
        self.embedding = matrix(TABLE)
        self.layers = nn.ModuleList(
            Layer(checkpoint, index, levels=levels, fixed=fixed, device=device) for index in range(config.layers)
        )
        self.norm = _parameter(checkpoint.vector(NORM))
        tied = config.tied or not checkpoint.has(HEAD)
        self.lm_head = None if tied else matrix(HEAD)
        self.dtype = torch.float32
        self._tables: tuple[Tensor, Tensor] | None = None
        self.to(device)

    def computes_in(self, dtype: torch.dtype) -> Decoder:
        """Run products in `dtype`; parameters stay as they are."""
        self.dtype = dtype
        for layer in self.layers:
            layer.dtype = dtype
        return self

    def matrices(self) -> dict[str, tuple[str, AnyMatrix]]:
        """Module path -> (role, matrix), the table's role being `embedding`."""
        found: dict[str, tuple[str, AnyMatrix]] = {TABLE: ("embedding", self.embedding)}
        for index, layer in enumerate(self.layers):
            for role, matrix in layer.matrices().items():
                found[f"model.layers.{index}.{ROLES[role]}"] = (role, matrix)
        if self.lm_head is not None:
            found[HEAD] = ("head", self.lm_head)
        return found

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(final normed states (sequences, T, hidden) float32, the head (vocabulary, hidden)) of ids (sequences, T)."""
        table = self.embedding.weight()
        cos, sin = self.rope(ids.shape[1], ids.device)
        state = F.embedding(ids, table).float()
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                state = recompute(layer, state, cos, sin, use_reentrant=False)
            else:
                state = layer(state, cos, sin)
        head = table if self.lm_head is None else self.lm_head.weight()
        return rms_norm(state, self.norm, self.config.norm_eps), head.to(self.dtype)

    def logits(self, ids: Tensor) -> Tensor:
        """(sequences, T, vocabulary) float32."""
        state, head = self(ids)
        return (state.to(self.dtype) @ head.T).float()

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, (length, head_dim / 2) each."""
        if self._tables is None or len(self._tables[0]) < length or self._tables[0].device != device:
            cos, sin = tables(self.config.rope, self.config.head_dim, length)
            self._tables = torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)
        return self._tables[0][:length], self._tables[1][:length]

    def to_block(self, source: Block) -> Block:
        """A block of `Checkpoint.blocks` with the trained weights."""
        if source.name.startswith("layers."):
            layer: Layer = self.layers[int(source.name.removeprefix("layers."))]
            return layer.to_block(source.name, source)
        ours = self.matrices()
        matrices = {path: ours[path][1].fold() if path in ours else weight for path, weight in source.matrices.items()}
        vectors = {name: _array(self.norm) if name == NORM else vector for name, vector in source.vectors.items()}
        return Block(source.name, matrices, vectors)


def layer_forward(
    state: Tensor,
    cos: Tensor,
    sin: Tensor,
    w: LayerTensors,
    head_dim: int,
    eps: float,
    window: int | None,
) -> Tensor:
    """One layer of `edgekit.model.reference` on (sequences, T, hidden), float32 in and out."""
    dtype = w.q.dtype
    batch, length, _ = state.shape
    x = rms_norm(state, w.gains["before_attention"], eps).to(dtype)
    q, k, v = (
        _linear(x, matrix, w.biases.get(role)).view(batch, length, -1, head_dim).transpose(1, 2)
        for role, matrix in (("q", w.q), ("k", w.k), ("v", w.v))
    )
    if "q_norm" in w.gains:
        q, k = rms_norm(q, w.gains["q_norm"], eps), rms_norm(k, w.gains["k_norm"], eps)
    q, k = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype)
    mask = None
    if window is not None and window < length:
        distance = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)
        mask = (distance >= 0) & (distance < window)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    state = state + _linear(mixed, w.o, w.biases.get("o"))
    x = rms_norm(state, w.gains["before_mlp"], eps).to(dtype)
    active = F.silu(_linear(x, w.gate, w.biases.get("gate"))) * _linear(x, w.up, w.biases.get("up"))
    return state + _linear(active, w.down, w.biases.get("down"))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain over the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, W, None if bias is None else bias.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (..., T, head_dim) by each position's angles, as `edgekit.model.reference` does."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _parameter(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(values, np.float32)))


def _array(parameter: Tensor) -> np.ndarray:
    array: np.ndarray = parameter.detach().float().cpu().numpy()
    return array


def frozen(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A model that is only asked: its matrices in `dtype`, nothing trainable."""
    model = Decoder(checkpoint, device=device)
    for _, matrix in model.matrices().values():
        matrix.values = nn.Parameter(matrix.weight().detach().to(dtype), requires_grad=False)
        matrix.quantiser = None
    model.requires_grad_(False)
    return model.computes_in(dtype)


def refuse_different_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ModelError where two models do not have the same tokens."""
    ours, theirs = student.decoder.vocabulary, teacher.decoder.vocabulary
    if ours != theirs:
        raise ModelError(
            f"teacher and student must have one vocabulary: {teacher.source.name} has {theirs} tokens,"
            f" {student.source.name} has {ours}; name the model that the student was made from"
        )
    pair = student.assets.get("tokenizer.json"), teacher.assets.get("tokenizer.json")
    if None not in pair and pair[0] != pair[1]:
        import json

        vocabularies = [json.loads(text)["model"].get("vocab") for text in pair if text is not None]
        if vocabularies[0] != vocabularies[1]:
            raise ModelError(
                f"teacher and student must have one tokenizer: those of {teacher.source.name} and"
                f" {student.source.name} map text to other ids; name the model that the student was made from"
            )
