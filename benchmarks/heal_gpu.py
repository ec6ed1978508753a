"""The trainer of the long healing runs: one CUDA graph a step, and texts that differ a little in each pass.

Little text seen often is learnt by heart, so in each pass a share of the tokens is replaced by others that the teacher
finds likely at the same place: samples of its distribution after the true text before them, drawn once for all
windows. No text is added, and the targets are what the teacher says about the text as changed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from edgekit.errors import ModelError
from edgekit.heal.data import Corpus
from edgekit.heal.decoder import Decoder
from edgekit.heal.trainer import Trainer

SAMPLES = 1  # of the teacher for each token: in six passes a token is replaced less than once


class GraphTrainer(Trainer):
    """A trainer that replays forward and backward pass as one CUDA graph: 210 small roundings a step otherwise keep the
    CPU busier than the GPU. Every token is scored; the batch is taken at once. Without a GPU it runs step by step.

    `others`: (SAMPLES, windows, length), what may stand in the place of each token; `share` of them is replaced.
    """

    graph: torch.cuda.CUDAGraph | None = None
    others: Any = None
    share = 0.0

    def _train(self, rows: Any, rate: float) -> float:
        batch = self.data.train.ids[rows]
        if self.share:
            batch = replaced(batch, self.others[:, rows], self.share, seed=(self.training.seed, self.step))
        ids = torch.from_numpy(batch.astype(np.int64))
        if self.device.type == "cuda":
            if self.graph is None:
                self.capture(ids)
            self.ids.copy_(ids)
            self.graph.replay()
        else:
            self.ids = ids
            self.loss = self.forward_backward()
        mean, norm = float(self.loss), self.optimizers.clip(self.training.optimization.clip)
        if not math.isfinite(mean + norm):
            self._restore_best()
            raise ModelError(f"the loss must be finite: step {self.step + 1} gave {mean:.4g} and a norm of {norm:.4g}")
        self.optimizers.step(rate)
        return mean

    def capture(self, ids: torch.Tensor) -> None:
        """Record one step's passes; the gradients then always lie at the same place."""
        self.ids = ids.to(self.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizers.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.forward_backward()

    def forward_backward(self) -> torch.Tensor:
        self.optimizers.zero_grad()
        loss: torch.Tensor = self.task(self.ids, None) / (self.ids.shape[0] * (self.ids.shape[1] - 1))
        loss.backward()
        return loss.detach()


def replaced(ids: Any, others: Any, share: float, *, seed: tuple[int, int]) -> Any:
    """Windows (N, length) with `share` of the tokens taken from one of `others`: (samples, N, length)."""
    draw = np.random.default_rng(seed)
    taken = others[draw.integers(len(others))]
    return np.where(draw.random(ids.shape) < share, taken, ids)


@torch.no_grad()
def samples(teacher: Decoder, corpus: Corpus, device: torch.device, *, batch: int = 32) -> Any:
    """(SAMPLES, windows, length) uint16: what the teacher could have said in the place of each token."""
    torch.manual_seed(0)
    found = np.empty((SAMPLES, *corpus.ids.shape), np.uint16)
    for start in range(0, len(corpus), batch):  # whole batches, the last one twice in part
        part = slice(min(start, max(0, len(corpus) - batch)), start + batch)
        ids = torch.from_numpy(corpus.ids[part].astype(np.int64)).to(device)
        p = teacher.logits(ids).softmax(-1)
        found[:, part, 0] = corpus.ids[part, 0]
        for index in range(SAMPLES):  # the largest of p / Exp(1) is a sample of p
            drawn = (p / torch.empty_like(p).exponential_()).argmax(-1)
            found[index, part, 1:] = drawn[:, :-1].cpu().numpy()
    return found
