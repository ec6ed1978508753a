"""What other selections of positions cost, in torch: the exact largest logits, Quest, and a window with sinks.

The tokens that are scored attend, in each layer but the first two and for each query head on its own, to `budget`
positions that a method picks, and to nothing else; what stands before them in the cache was read with exact attention,
by the bundle whose cache is borrowed. All tokens run at once, layer by layer: the same as one after the other.

    top      the largest logits themselves: what a perfect estimate would pick
    quest    pages of 16 positions by sum_c max(q_c min_c, q_c max_c) over a page's keys (arXiv 2406.10774)
    window   the newest positions and the first 4 (arXiv 2309.17453)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint
from edgekit.model.rope import tables

SINKS, PAGE, DENSE_LAYERS = 4, 16, 2
Pick = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def top(q: torch.Tensor, k: torch.Tensor, logits: torch.Tensor, budget: int) -> torch.Tensor:
    """Which positions (rows, n) queries (rows, d) attend to, of keys (n, d); logits (rows, n), -inf ahead of them."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter_(1, logits.topk(budget, dim=1).indices, True)


def quest(q: torch.Tensor, k: torch.Tensor, logits: torch.Tensor, budget: int) -> torch.Tensor:
    count, d = k.shape
    pages = -(-count // PAGE)
    padded = torch.cat([k, k[-1:].expand(pages * PAGE - count, d)]).view(pages, PAGE, d)
    low, high = padded.amin(1), padded.amax(1)
    positive, negative = q.clamp(min=0), q.clamp(max=0)
    bound = positive @ high.T + negative @ low.T  # sum of max(q low, q high)
    behind = torch.isfinite(logits[:, ::PAGE])  # a page counts from its first position on
    bound = bound.masked_fill(~behind, -math.inf)
    newest = behind.sum(1, keepdim=True) - 1
    bound.scatter_(1, newest, math.inf)  # the page that is being written
    chosen = torch.zeros_like(bound, dtype=torch.bool).scatter_(1, bound.topk(budget // PAGE, dim=1).indices, True)
    return chosen.repeat_interleave(PAGE, dim=1)[:, :count]


def window(q: torch.Tensor, k: torch.Tensor, logits: torch.Tensor, budget: int) -> torch.Tensor:
    position = torch.arange(k.shape[0])
    length = torch.isfinite(logits).sum(1, keepdim=True)
    return (position < SINKS) | (position >= length - (budget - SINKS))


METHODS: Mapping[str, Pick] = {"exact largest logits": top, "Quest": quest, "window and sinks": window}


class Selected:
    """A decoder in float32 whose last tokens attend to picked positions."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.decoder
        self.table = torch.from_numpy(checkpoint.weight("model.embed_tokens").dense())
        self.head = self.table if self.config.tied else torch.from_numpy(checkpoint.weight("lm_head").dense())
        self.norm = torch.from_numpy(checkpoint.vector("model.norm.weight"))
        self.layers = [self._layer(checkpoint, index) for index in range(self.config.layers)]

    @staticmethod
    def _layer(checkpoint: Checkpoint, index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}."
        matrices = [f"self_attn.{part}_proj" for part in "qkvo"] + [
            f"mlp.{part}_proj" for part in ("gate", "up", "down")
        ]
        found = {name: torch.from_numpy(checkpoint.weight(prefix + name).dense()) for name in matrices}
        norms = ("input_layernorm", "post_attention_layernorm")
        return found | {name: torch.from_numpy(checkpoint.vector(f"{prefix}{name}.weight")) for name in norms}

    @torch.no_grad()
    def loss(
        self, cache: Mapping[str, NDArray[Any]], ids: Sequence[int], *, first: int, pick: Pick, budget: int
    ) -> float:
        """Mean loss of ids[first + 1:], given `cache`, the parts of an engine's that holds ids[:first]."""
        tokens = torch.tensor(ids[first:-1])
        cos, sin = tables(self.config.rope, self.config.head_dim, len(ids))
        turn = tuple(torch.from_numpy(table[first : len(ids) - 1].astype(np.float32)) for table in (cos, sin))
        state = self.table[tokens]
        for index, weight in enumerate(self.layers):
            past = [
                torch.from_numpy(cache[f"{index}.{part}"][0, :, :first].astype(np.float32)) for part in ("key", "value")
            ]
            chosen = None if index < DENSE_LAYERS else pick
            state = state + self._attend(
                weight, self._normed(state, weight["input_layernorm"]), past, turn, chosen, budget
            )
            normed = self._normed(state, weight["post_attention_layernorm"])
            gate = torch.nn.functional.silu(normed @ weight["mlp.gate_proj"].T)
            state = state + (gate * (normed @ weight["mlp.up_proj"].T)) @ weight["mlp.down_proj"].T
        logits = self._normed(state, self.norm) @ self.head.T
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first + 1 :])))

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * weight

    def _attend(
        self,
        weight: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        past: Sequence[torch.Tensor],
        turn: tuple[torch.Tensor, torch.Tensor],
        pick: Pick | None,
        budget: int,
    ) -> torch.Tensor:
        count, d = len(x), self.config.head_dim
        q, k, v = ((x @ weight[f"self_attn.{part}_proj"].T).view(count, -1, d).transpose(0, 1) for part in "qkv")
        q, k = _rotated(q, *turn), _rotated(k, *turn)
        keys, values = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
        length, group = keys.shape[1], len(q) // len(k)
        ahead = torch.arange(length) > length - count + torch.arange(count)[:, None]
        mixed = []
        for head, query in enumerate(q):
            key = keys[head // group]
            logits = (query @ key.T / math.sqrt(d)).masked_fill_(ahead, -math.inf)
            if pick is not None:
                logits.masked_fill_(~pick(query, key, logits, budget), -math.inf)
            mixed.append(torch.softmax(logits, -1) @ values[head // group])
        return torch.stack(mixed, dim=1).reshape(count, -1) @ weight["self_attn.o_proj"].T


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
