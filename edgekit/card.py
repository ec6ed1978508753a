"""The model card: `MODEL_CARD.md` of a bundle, made of its manifest. Regenerated, never edited by hand.

It tells what the Hub's front matter asks for (licence, base model, tags) and, in words, where the model comes from,
what was done to it, what was measured and how, what it is for and where it ends. It holds no time and no
duration, so that the same manifest gives the same bytes.
Source: M. Mitchell et al., Model Cards for Model Reporting, 2019; the front matter is huggingface_hub's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit.folder import write_file
from edgekit.manifest import Manifest, StepRecord, record_files
from edgekit.report import Measurement, Report, cells, plain

CARD = "MODEL_CARD.md"
OURS = "edgekit"
# The licence ids of the Hub that local models are mostly under; others go out as "other" with their name.
LICENSES = {
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    *("bigscience-bloom-rail-1.0", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("cc", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "gpl", "gpl-2.0"),
    *("gpl-3.0", "lgpl", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense", "gemma", "llama2", "llama3"),
    *("llama3.1", "llama3.2", "llama3.3", "llama4", "unknown"),
}


def write_card(folder: Path, *, reports: Sequence[Report] = ()) -> Manifest:
    """Write the card of the bundle in `folder` anew and renew its digest; a signature does not outlive that.

    The measurements of `reports` (of edgekit eval and profile) go into the manifest, those of the same name instead of
    the older ones. Raises ModelError: the folder is not whole.
    """
    manifest = Manifest.load(folder)
    rows = {row.name: row for row in manifest.measurements}
    rows |= {row.name: row for report in reports for row in report.measurements}
    manifest = replace(manifest, measurements=tuple(rows.values()))
    write_file(folder / CARD, card_text(manifest).encode())
    manifest = replace(manifest, files=dict(sorted({**manifest.files, **record_files(folder, [CARD])}.items())))
    (folder / "edgekit.json.sig").unlink(missing_ok=True)
    manifest.save(folder)
    return manifest


def card_text(manifest: Manifest) -> str:
    """The card of what a manifest describes."""
    from huggingface_hub import ModelCardData

    license = manifest.source.license.lower()
    known = license in LICENSES
    base = manifest.source.name.partition("@")[0] if manifest.source.kind == "hub" else None
    data = ModelCardData(
        license=license if known else "other",
        license_name=None if known else plain(manifest.source.license),
        library_name=OURS,
        base_model=base,
        base_model_relation="quantized" if base and manifest.steps else None,
        tags=["edgekit", "onnx", *sorted({step.step for step in manifest.steps})],
    )
    body = [
        f"# {plain(manifest.source.name)}, by edgekit",
        "",
        f"Made by edgekit {manifest.versions.get('edgekit', '')}. Do not edit: `edgekit card` writes it anew.",
        "",
        "## Where it comes from",
        "",
        f"- source: {plain(manifest.source.name)} ({manifest.source.kind}), sha256 `{manifest.source.digest}`",
        f"- licence of the source: {plain(manifest.source.license)}; it holds for this model too",
        f"- recipe: {plain(manifest.recipe) or 'none'}, seed {manifest.seed}, sha256 `{manifest.recipe_sha256}`",
        f"- versions: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
        "",
        "## What was done to it",
        "",
        *([_step(step) for step in manifest.steps] or ["Nothing: the weights are those of the source."]),
        "",
        "## What was measured",
        "",
        *_table(manifest.measurements),
        "",
        "## What it is for",
        "",
        "What the source is for, on devices with little memory. Its own card says what that is.",
        "",
        "## Limits",
        "",
        "- All limits of the source, and what compression took beside them: compare with `edgekit eval SOURCE BUNDLE`.",
        "- Average scores hide answers that changed: see the flips there.",
        "- What is not in the table above was not measured.",
        "",
        "## Energy",
        "",
        _energy(manifest.measurements),
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n" + "\n".join(body)


def _step(step: StepRecord) -> str:
    options = ", ".join(f"{name} {value}" for name, value in step.options.items())
    return plain(
        f"- {step.step} ({options}): {step.changed} weights changed, {len(step.skipped)} skipped,"
        f" {step.before_bytes / 1e6:.1f} MB -> {step.after_bytes / 1e6:.1f} MB"
    )


def _table(measurements: Sequence[Measurement]) -> list[str]:
    lines = ["| measurement | value | unit | ± | n | how | note |", "|---|--:|---|--:|--:|---|---|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in measurements]


def _energy(measurements: Sequence[Measurement]) -> str:
    found = [row for row in measurements if row.name.startswith(("energy per", "CO2", "cost"))]
    if not found:
        return "Not measured: profile it on the device and add the report with `edgekit card`."
    return plain("; ".join(f"{row.name}: {cells(row)[1]} {row.unit} ({row.how})" for row in found))
