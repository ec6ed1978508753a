"""What the healing runs train and are measured on: token windows as .npz, perplexity and multiple choice on a device.

Perplexity as everywhere: 24 windows of 1024 tokens, second halves; accuracy by length-normalised likelihood.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from heal_models import plain

from edgekit.checkpoint import Checkpoint
from edgekit.heal.data import Encoder, pack
from edgekit.heal.decoder import Decoder

FILES = ("textbooks", "ebooks", "novels", "chat_train")
TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa")
BOOKS = ("moby-dick", "war-and-peace", "middlemarch", "the-count-of-monte-cristo")
WINDOW, WINDOWS = 1024, 24
BOOK_BYTES = 600_000  # of a book hold 24 windows


def prepare(source: Checkpoint, root: Path, out: Path) -> None:
    """Tokens of the healing files, and the evaluation sets, as .npz."""
    out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(source)
    for name in FILES:
        if not (out / f"{name}.npz").exists():
            corpus = pack(encoder.documents(root / "heal" / f"{name}.jsonl.gz"), WINDOW, separator=encoder.separator)
            np.savez(out / f"{name}.npz", ids=corpus.ids.astype(np.uint16))
    np.savez(out / "eval.npz", **_texts(encoder, root), **_choices(encoder, root))


def _texts(encoder: Encoder, root: Path) -> dict[str, Any]:
    from edgekit.evaluate.text import read_text

    sets = {}
    texts = {"wikitext2": "text/wikitext2_valid.raw.txt.gz", **{name: f"longctx/{name}.txt.gz" for name in BOOKS}}
    for name, file in texts.items():
        text = read_text(root / file)[:BOOK_BYTES]
        ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids[: WINDOW * WINDOWS]
        sets[name] = np.array(ids, np.uint16).reshape(WINDOWS, WINDOW)
    return sets


def _choices(encoder: Encoder, root: Path) -> dict[str, Any]:
    """For each task, by choice: tokens in a row with their starts, how many are scored, bytes, question; answers."""
    from edgekit.evaluate.choices import load_items

    def tokens(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in encoder.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    sets: dict[str, Any] = {}
    for task in TASKS:
        items = load_items(root / "eval" / f"{task}.jsonl.gz")
        pairs = [pair for item in items for pair in item.pairs]
        heads, tails = tokens([context for context, _ in pairs]), tokens([choice for _, choice in pairs])
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        sets[f"{task}.ids"] = np.array([token for row in rows for token in row], np.uint16)
        sets[f"{task}.starts"] = np.cumsum([0, *map(len, rows)])
        sets[f"{task}.scored"] = np.array([len(tail) for tail in tails])
        sets[f"{task}.bytes"] = np.array([len(choice.encode()) for _, choice in pairs])
        sets[f"{task}.item"] = np.array([index for index, item in enumerate(items) for _ in item.pairs])
        sets[f"{task}.answer"] = np.array([item.answer for item in items])
    return sets


def evaluate(model: Decoder, sets: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Perplexities (products in float32) and accuracies of the model as it would be written."""
    exact = plain(model, torch.float32)
    found: dict[str, Any] = {"wikitext2": perplexity(exact, sets["wikitext2"], device)}
    found["books"] = {name: perplexity(exact, sets[name], device) for name in BOOKS}
    fast = plain(model, model.dtype)
    found["accuracy"] = {task: accuracy(fast, sets, task, device) for task in TASKS}
    return found


@torch.no_grad()
def perplexity(model: Decoder, windows: Any, device: torch.device) -> float:
    """Second halves of the windows, as everywhere."""
    total, count = 0.0, 0
    for start in range(0, len(windows), 8):
        ids = torch.from_numpy(windows[start : start + 8].astype(np.int64)).to(device)
        logits = model.logits(ids)[:, WINDOW // 2 : -1].double().log_softmax(-1)
        total -= float(logits.gather(-1, ids[:, WINDOW // 2 + 1 :, None]).sum())
        count += ids.shape[0] * (WINDOW - WINDOW // 2 - 1)
    return float(np.exp(total / count))


@torch.no_grad()
def accuracy(model: Decoder, sets: dict[str, Any], task: str, device: torch.device) -> float:
    """Percent of items whose right choice has the highest likelihood a byte."""
    ids, starts, scored = (sets[f"{task}.{part}"] for part in ("ids", "starts", "scored"))
    lengths = np.diff(starts)
    order, score = np.argsort(lengths), np.zeros(len(lengths))
    for at in range(0, len(order), 128):
        rows = order[at : at + 128]
        width = -(-int(lengths[rows].max()) // 32) * 32
        batch, flags = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.bool_)
        for i, row in enumerate(rows):
            n = lengths[row]
            batch[i, :n] = ids[starts[row] : starts[row + 1]]
            flags[i, n - scored[row] : n] = True
        x = torch.from_numpy(batch).to(device)
        logp = model.logits(x)[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
        score[rows] = (logp * torch.from_numpy(flags[:, 1:]).to(device)).sum(-1).cpu().numpy()
    score /= sets[f"{task}.bytes"]
    item, answer = sets[f"{task}.item"], sets[f"{task}.answer"]
    return float(100 * np.mean([int(np.argmax(score[item == i]) == answer[i]) for i in range(len(answer))]))
