"""One decoder layer in torch, cut where its matrices read: for calibration, sensitivity and healing.

    n = norm1(x)        q, k, v read it          "attention_input"
    m = attention(n)    o reads it               "mixed"
    r = x + m Wo^T
    p = norm2(r)        gate and up read it      "mlp_input"
    g = silu(p Wg^T) * (p Wu^T)   down reads it  "gated"
    y = r + g Wd^T

The same function as `edgekit.model.reference`, which it is tested against, in float32 and with autograd where asked.
Every width is read from the weights. Not supported: what `edgekit.model.config` does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekit.checkpoint import Block
from edgekit.errors import ModelError, UserError
from edgekit.model.config import DecoderConfig
from edgekit.model.heads import Heads, heads_of_block, turned_by
from edgekit.model.rope import tables
from edgekit.model.stages import LINEARS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    """One decoder layer: matrices and vectors by their places in it, such as `mlp.up_proj`; all float32."""

    config: DecoderConfig
    matrices: dict[str, Tensor]
    biases: dict[str, Tensor]
    norms: dict[str, Tensor]
    heads: Heads

    @classmethod
    def of(cls, block: Block, config: DecoderConfig, on: torch.device = CPU) -> Layer:
        """The layer of a block, its numbers on a torch device.

        Raises ModelError: the block lacks a matrix or a norm, or holds one more.
        """
        prefix = f"model.{block.name}."
        matrices = {module.removeprefix(prefix): weight for module, weight in block.matrices.items()}
        wrong = sorted(set(matrices) ^ set(LINEARS))
        if wrong:
            raise ModelError(f"a decoder layer must have {', '.join(LINEARS)}: {block.name} differs in {wrong[0]}")
        vectors = {name.removeprefix(prefix): torch.from_numpy(v).to(on) for name, v in block.vectors.items()}
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            if norm not in vectors:
                raise ModelError(f"the model must have {prefix}{norm}: its weights lack it")
        return cls(
            config,
            {leaf: torch.from_numpy(weight.dense()).to(on) for leaf, weight in matrices.items()},
            {name.removesuffix(".bias"): values for name, values in vectors.items() if name.endswith(".bias")},
            {name.removesuffix(".weight"): values for name, values in vectors.items() if name.endswith(".weight")},
            heads_of_block(block, config.head_dim),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for its input x: (windows, T, hidden)."""
        residual = self.add(x, "self_attn.o_proj", self.mixed(self.attention_input(x)))
        return self.add(residual, "mlp.down_proj", self.gated(self.mlp_input(residual)))

    def linear(self, leaf: str, x: Tensor) -> Tensor:
        return F.linear(x, self.matrices[leaf], self.biases.get(leaf))

    def add(self, residual: Tensor, leaf: str, x: Tensor) -> Tensor:
        """The residual stream after the matrix `leaf`, which reads x, wrote to it."""
        return residual + self.linear(leaf, x)

    def attention_input(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norms["input_layernorm"], self.config.norm_eps)

    def mlp_input(self, residual: Tensor) -> Tensor:
        return rms_norm(residual, self.norms["post_attention_layernorm"], self.config.norm_eps)

    def gated(self, x: Tensor) -> Tensor:
        return F.silu(self.linear("mlp.gate_proj", x)) * self.linear("mlp.up_proj", x)

    def mixed(self, x: Tensor) -> Tensor:
        """Causal attention over (windows, T, hidden) normed states, (windows, T, heads * head_dim)."""
        count, length, _ = x.shape
        q, k = (self._heads(f"self_attn.{part}_proj", x, self.heads.key_size) for part in "qk")
        v = self._heads("self_attn.v_proj", x, self.heads.value_size)
        if "self_attn.q_norm" in self.norms:
            q = rms_norm(q, self.norms["self_attn.q_norm"], self.config.norm_eps)
            k = rms_norm(k, self.norms["self_attn.k_norm"], self.config.norm_eps)
        q, k = self._turned(q), self._turned(k)
        window = self.config.sliding_window
        banded = window is not None and window < length
        mask = _band(length, cast(int, window), x.device) if banded else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not banded, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(count, length, -1)

    def _heads(self, leaf: str, x: Tensor, size: int) -> Tensor:
        """(windows, heads, T, size)"""
        y = self.linear(leaf, x)
        return y.view(*y.shape[:2], -1, size).transpose(1, 2)

    def _turned(self, x: Tensor) -> Tensor:
        found = tables(self.config.rope, self.config.head_dim, x.shape[-2])
        cos, sin = (torch.from_numpy(turned_by(table, self.heads.pairs)).to(x.device) for table in found)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def torch_device(name: str) -> torch.device:
    """The device of a name such as "cpu", "cuda" or "cuda:1". Raises UserError: there is none of this name here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA asserts
        reason = str(problem).splitlines()[0]
        raise UserError(f"torch must have the device on this machine: got {name!r} ({reason})") from problem
    return device


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _band(length: int, window: int, on: torch.device) -> Tensor:
    """Which keys each query may see: itself and the window - 1 before it."""
    at = torch.arange(length, device=on)
    distance = at[:, None] - at
    return (distance >= 0) & (distance < window)
