"""Export of an encoder for an NPU: one graph of fixed shapes, checked, and compiled where a device is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgekit.bundle import MODEL, SPEC, WEIGHTS, EncoderSpec, StaticGraphs
from edgekit.checkpoint import Checkpoint, refuse_overlap
from edgekit.device import Device
from edgekit.errors import UserError
from edgekit.export.encoder import check_encoder, refuse_misfits, token_ids
from edgekit.export.graph import Graph
from edgekit.export.npu import OBSERVER, compiled_record, hexagon, hide
from edgekit.export.record import write_manifest
from edgekit.export.rounded import Rounding
from edgekit.export.static_encoder import build_static_encoder
from edgekit.export.targets import Target
from edgekit.folder import new_folder
from edgekit.manifest import Manifest
from edgekit.model.encoder_config import encoder_config
from edgekit.runtime.providers import Choice
from edgekit.runtime.static import load_graph, padded_text

TOKENS = 256  # of a text at most: a short one costs as much as a long one
ROOM = 2  # times the range seen: the texts are few, and what is clipped costs far more than one of 16 bits


def export_npu_encoder(
    checkpoint: Checkpoint,
    output: Path,
    *,
    target: Target,
    device: Device | None = None,
    force: bool = False,
    accept_drift: bool = False,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Write an encoder's bundle for the NPU that `target` names; ranges come from the texts that it is checked with.

    Raises as `edgekit.export.npu_export.export_npu` and `edgekit.export.encoder.export_encoder`.
    """
    config = encoder_config(checkpoint.config)
    if "tokenizer.json" not in checkpoint.assets:
        raise UserError(
            f"a bundle needs tokenizer.json: {checkpoint.source.name} has none; save a fast tokenizer with it"
        )
    refuse_misfits(checkpoint, config)
    refuse_overlap(checkpoint, output)
    htp = hexagon(device, target)
    tokens = min(TOKENS, config.max_length)
    with new_folder(output, force=force) as folder:
        on_progress("building the graph")
        spec = EncoderSpec(
            architecture=config.architecture,
            target=target.name,
            vocabulary=config.vocabulary,
            max_length=tokens,
            dim=config.hidden_size,
            pooling=config.pooling,
            normalize=config.normalize,
            resident_bytes=0,
            activation_bytes=4 * (6 * config.hidden_size + 2 * config.mlp),
        )
        texts = token_ids(checkpoint, spec)
        rounding = build_npu_encoder(checkpoint, folder, texts, tokens=tokens, rounded=target.provider == "qnn")
        assert target.provider
        static = StaticGraphs(target.provider, tokens, rounding.hidden, "float32")
        spec = dataclasses.replace(spec, static=static, resident_bytes=(folder / WEIGHTS).stat().st_size)
        for name, content in checkpoint.assets.items():
            (folder / name).write_bytes(content)
        on_progress("checking it against the NumPy forward")
        measured = check_encoder(checkpoint, folder, spec, accept_drift=accept_drift)
        if htp is not None:
            on_progress(f"compiling for Hexagon v{htp[0]}")
            measured = (*measured, compiled_record(folder, htp, files=(MODEL,)))
            spec = dataclasses.replace(spec, static=dataclasses.replace(static, compiled=f"Hexagon v{htp[0]}"))
        (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
        on_progress("writing digests")
        return write_manifest(checkpoint, folder, measured)


def build_npu_encoder(
    checkpoint: Checkpoint, folder: Path, texts: Sequence[Sequence[int]], *, tokens: int, rounded: bool
) -> Rounding:
    """Write model.onnx and its weights; returns how activations are rounded, by what they are over `texts`."""
    rounding = Rounding()
    with Graph(folder) as graph:
        if rounded:
            build_static_encoder(checkpoint, graph, tokens=tokens, rounding=rounding, file=OBSERVER, observe=True)
            graph.flush()
            session = load_graph(folder / OBSERVER, 1, Choice("onnxruntime CPU"))
            found = [
                session.run(["low", "high"], padded_text(ids, length=tokens, hidden=rounding.hidden)) for ids in texts
            ]
            (folder / OBSERVER).unlink()
            low = ROOM * np.min([extremes[0] for extremes in found], 0)[:, 0].astype(np.float64)
            high = ROOM * np.max([extremes[1] for extremes in found], 0)[:, 0].astype(np.float64)
            names = rounding.observed
            ranges = {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
            rounding = Rounding(ranges, hide(ranges, encoder_config(checkpoint.config).layers))
        build_static_encoder(checkpoint, graph, tokens=tokens, rounding=rounding, file=MODEL)
    return rounding
