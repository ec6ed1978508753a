"""Perplexity of the same token windows by other means than our runtime: torch, and llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contestants import SILENT

from edgekit.checkpoint import Checkpoint
from edgekit.evaluate.perplexity import log_likelihoods

WINDOW = 1024
HALF = WINDOW // 2
AT_ONCE = 4  # windows that torch runs together
THREADS = 2
Windows = Sequence[list[int]]


def of_losses(losses: list[Any]) -> float:
    return float(np.exp(np.concatenate(losses).mean()))


def torch_perplexity(gguf: Path, windows: Windows) -> float:
    """Through transformers' own loading of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    losses = []
    with torch.inference_mode():
        for tokens in windows:
            states = model.model(torch.tensor([tokens])).last_hidden_state[0, HALF:-1]
            losses.append(-log_likelihoods(model.lm_head(states).numpy(), tokens[HALF + 1 :]))
    return of_losses(losses)


def view_perplexity(checkpoint: Checkpoint, windows: Windows) -> float:
    """In float32 torch on the dequantised weights, block by block: one block is in memory."""
    import torch

    from edgekit.model.torch_view import Layer, rms_norm

    config = checkpoint.decoder
    ids = torch.tensor(windows)
    with torch.inference_mode():
        table = torch.from_numpy(checkpoint.weight("model.embed_tokens").dense())
        states = table[ids]
        for index in range(config.layers):
            layer = Layer.of(checkpoint.read_block(f"layers.{index}"), config)
            states = torch.cat([layer(part) for part in states.split(AT_ONCE)])
        head = table if config.tied else torch.from_numpy(checkpoint.weight("lm_head").dense())
        gain = torch.from_numpy(checkpoint.vector("model.norm.weight"))
        losses = []
        for state, tokens in zip(states, windows, strict=True):
            logits = rms_norm(state[HALF:-1], gain, config.norm_eps) @ head.T
            losses.append(-log_likelihoods(logits.numpy(), tokens[HALF + 1 :]))
    return of_losses(losses)


def quantised_by_llama(gguf: Path, output: Path, kind: str, *, pure: bool) -> Path:
    """`gguf` in one of llama.cpp's own formats, by its own quantiser; `pure` gives every matrix the same."""
    import llama_cpp

    if not output.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.allow_requantize, options.pure, options.nthread = True, pure, THREADS
        llama_cpp.llama_log_set(SILENT, None)
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(output).encode(), options):
            raise RuntimeError(f"llama.cpp could not make {kind} of {gguf}")
    return output


def llama_perplexity(gguf: Path, windows: Windows) -> float:
    """Through llama.cpp on the CPU."""
    import llama_cpp

    llama_cpp.llama_log_set(SILENT, None)
    llama = llama_cpp.Llama(
        str(gguf), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False, n_threads_batch=THREADS
    )
    losses = []
    for tokens in windows:
        llama.reset()
        llama.eval(tokens)
        losses.append(-log_likelihoods(np.array(llama.scores[HALF : WINDOW - 1]), tokens[HALF + 1 :]))
    llama.close()
    return of_losses(losses)
