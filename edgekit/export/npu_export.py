"""Export for an NPU: graphs of fixed shapes, checked on the CPU, and compiled where a device is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from edgekit.bundle import SPEC, WEIGHTS, DecoderSpec, StaticGraphs
from edgekit.checkpoint import Checkpoint, refuse_overlap
from edgekit.device import Device
from edgekit.errors import UserError
from edgekit.export.export import activation_bytes, eos_ids, open_tokenizer, sentence
from edgekit.export.npu import SAMPLE, build_npu, compiled_record, hexagon
from edgekit.export.parity import BOUNDS, PROMPTS, Bounds, check_parity
from edgekit.export.record import write_manifest
from edgekit.export.targets import Target
from edgekit.folder import new_folder
from edgekit.manifest import Manifest
from edgekit.runtime.providers import Choice
from edgekit.runtime.static import StaticEngine

CONTEXT = 1024  # tokens, unless asked for more or fewer: every token reads all of a fixed cache
CHUNK = 128  # tokens of a prompt that go through at once


def export_npu(
    checkpoint: Checkpoint,
    output: Path,
    *,
    target: Target,
    device: Device | None = None,
    context: int | None = None,
    calibration: str | None = None,
    force: bool = False,
    accept_drift: bool = False,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Write a bundle for the NPU that `target` names; `calibration` is the text whose activations give the ranges.

    With a Qualcomm device the graphs are compiled for its Hexagon, and the report names what stayed on the CPU.
    Raises UserError, ModelError as `edgekit.export.export.export`; DeviceError: the compiler is missing or refuses.
    """
    assert target.provider
    config = checkpoint.decoder
    if "tokenizer.json" not in checkpoint.assets:
        raise UserError(
            f"a bundle needs tokenizer.json: {checkpoint.source.name} has none; save a fast tokenizer with it"
        )
    longest = min(config.context_length, CONTEXT) if context is None else context
    if not 2 <= longest <= config.context_length:
        raise UserError(f"--context must be from 2 to the model's {config.context_length}: got {context}")
    if config.sliding_window:
        raise UserError("an NPU's graphs attend to the whole context: the model has a sliding window")
    htp = hexagon(device, target)
    chunk = min(CHUNK, longest)
    refuse_overlap(checkpoint, output)
    tokenizer = open_tokenizer(checkpoint)
    sample: Sequence[int] = tokenizer.encode(calibration or "\n\n".join(PROMPTS)).ids[:SAMPLE]
    if len(sample) < chunk:
        sample = (list(sample) * chunk)[:chunk]
    with new_folder(output, force=force) as folder:
        on_progress("building the graphs")
        layers, rounding = build_npu(
            checkpoint, folder, context=longest, chunk=chunk, rounded=target.provider == "qnn", sample=sample
        )
        static = StaticGraphs(
            provider=target.provider,
            chunk=chunk,
            hidden=rounding.hidden,
            cache="float32" if rounding.ranges is None else "uint16",
        )
        spec = DecoderSpec(
            architecture=config.architecture,
            target=target.name,
            vocabulary=config.vocabulary,
            context_length=longest,
            layers=layers,
            eos_ids=eos_ids(checkpoint),
            resident_bytes=2 * (folder / WEIGHTS).stat().st_size,  # each of the two graphs keeps its own
            activation_bytes=activation_bytes(checkpoint),
            static=static,
        )
        for name, content in checkpoint.assets.items():
            (folder / name).write_bytes(content)
        on_progress("checking them against the NumPy forward")
        engine = StaticEngine(folder, spec, threads=1, choice=Choice("onnxruntime CPU"))
        sequences = [ids[: min(64, longest)] for ids in (tokenizer.encode(prompt).ids for prompt in PROMPTS) if ids]
        bounds = Bounds(kl=float("inf"), agreement=0.0) if accept_drift else BOUNDS["int8"]
        measured = check_parity(checkpoint, engine, sequences, bounds=bounds)
        measured = (*measured, sentence(engine, tokenizer, sequences[0]))
        if htp is not None:
            on_progress(f"compiling for Hexagon v{htp[0]}")
            measured = (*measured, compiled_record(folder, htp))
            spec = dataclasses.replace(spec, static=dataclasses.replace(static, compiled=f"Hexagon v{htp[0]}"))
        (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
        on_progress("writing digests")
        return write_manifest(checkpoint, folder, measured)
