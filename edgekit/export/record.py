"""What an export leaves on record: the report of what was measured, and the manifest with where all of it came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.bundle import MODEL, WEIGHTS
from edgekit.card import CARD, card_text
from edgekit.checkpoint import Checkpoint
from edgekit.folder import write_file
from edgekit.manifest import Manifest, now, record_files, versions
from edgekit.report import Measurement, Report


def write_manifest(checkpoint: Checkpoint, folder: Path, measured: tuple[Measurement, ...]) -> Manifest:
    """Write report.json, the model card and the manifest of the bundle in `folder`, whose other files are there."""
    size = (folder / WEIGHTS).stat().st_size + (folder / MODEL).stat().st_size
    measured = (Measurement("size of graph and weights", size / 1e6, "MB"), *measured)
    found = versions("numpy", "onnx", "onnxruntime", "tokenizers")
    report = Report(
        title="export", subject=checkpoint.source.name, measurements=measured, machine={}, versions=found, created=now()
    )
    report.save(folder / "report.json")
    before = checkpoint.manifest
    unfinished = Manifest(
        kind="bundle",
        source=checkpoint.source,
        files={},
        recipe=before.recipe if before else "",
        recipe_sha256=before.recipe_sha256 if before else "",
        seed=before.seed if before else 0,
        steps=before.steps if before else (),
        measurements=(*(before.measurements if before else ()), *measured),
        versions=found,
        created=now(),
    )
    write_file(folder / CARD, card_text(unfinished).encode())
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    manifest = replace(unfinished, files=record_files(folder, names))
    manifest.save(folder)
    return manifest
