"""Build a bundle again from its manifest, and say whether the bytes are the same.

The manifest names the source with its digest, the recipe with its hash and the seed, the target and the context. The
same of all these and of the versions gives the same files; what differs by nature is left aside: times, durations, peak
memory. Not supported: bundles with sparse attention or stretched rope, whose options a manifest does not hold, and
those of several recipes in a row.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle import Bundle
from edgekit.card import CARD
from edgekit.checkpoint import Checkpoint
from edgekit.compress import compress
from edgekit.errors import UserError
from edgekit.export.export import export
from edgekit.export.targets import find_target
from edgekit.manifest import Manifest
from edgekit.model.sources import open_model
from edgekit.recipe import Recipe, calibrated_on, load_recipe

REPORT = "report.json"


@dataclass(frozen=True)
class Reproduction:
    """File names: those that are the same, and what differs, with why where that is known. `versions` that changed."""

    same: tuple[str, ...]
    different: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not self.different


def reproduce(
    bundle: Path,
    *,
    source: str | None = None,
    recipe: str | None = None,
    calibration: Sequence[Path] = (),
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Reproduction:
    """Build the bundle again in a fresh folder and compare. `source` and `recipe` say where they lie now.

    Raises UserError: the source is another model, the recipe another recipe, or the manifest does not hold all options.
    """
    made = Bundle.open(bundle)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        again = rebuild(
            made,
            Path(folder) / "bundle",
            source=source or made.manifest.source.name,
            recipe=recipe,
            calibration=calibration,
            same_source=True,
            on_progress=on_progress,
        )
        return compare(bundle, made.manifest, Path(folder) / "bundle", again)


def rebuild(
    made: Bundle,
    output: Path,
    *,
    source: str,
    recipe: str | None = None,
    calibration: Sequence[Path] = (),
    same_source: bool = False,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Do to `source` what was done to the bundle's source, and write the bundle to `output`."""
    manifest, spec = made.manifest, made.spec
    if spec.sparse or any(row.name.startswith("context, times") for row in manifest.measurements):
        raise UserError(
            f"only plain exports can be rebuilt: {made.path} has sparse attention or a stretched context; export again"
        )
    opened = open_model(source, progress=on_progress)
    if same_source and opened.source.digest != manifest.source.digest:
        raise UserError(
            f"the source must be the one of the manifest, {manifest.source.digest[:16]}: {source} is"
            f" {opened.source.digest[:16]}; pass --source, or edgekit recompress for a newer one"
        )
    target = find_target(spec.target)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        checkpoint: Checkpoint = opened
        if manifest.recipe:
            steps = _recipe(manifest, recipe, calibration)
            on_progress(f"compressing by {steps.name}")
            compress(opened, steps, Path(folder) / "checkpoint")
            checkpoint = open_model(str(Path(folder) / "checkpoint"))
        context = min(spec.context_length, checkpoint.decoder.context_length)
        return export(checkpoint, output, target=target, context=context, on_progress=on_progress)


def compare(first: Path, one: Manifest, second: Path, other: Manifest) -> Reproduction:
    """Compare two bundles file by file, recorded times aside."""
    same, different = [], []
    added = len(one.measurements) != len(other.measurements)  # by edgekit card, into the manifest and the card
    for name in sorted({*one.files, *other.files}):
        a, b = one.files.get(name), other.files.get(name)
        if a is None or b is None:
            different.append(f"{name}: only one has it")
        elif a.sha256 == b.sha256 or (name == REPORT and _report(first) == _report(second)):
            same.append(name)
        elif name != CARD or not added:
            different.append(name)
    if _steps(one) != _steps(other):
        different.append("edgekit.json: the steps' records")
    names = sorted({*one.versions, *other.versions})
    changed = [
        f"{name} {one.versions.get(name, 'none')} -> {other.versions.get(name, 'none')}"
        for name in names
        if one.versions.get(name) != other.versions.get(name)
    ]
    return Reproduction(tuple(same), tuple(different), tuple(changed))


def _recipe(manifest: Manifest, given: str | None, calibration: Sequence[Path]) -> Recipe:
    found = load_recipe(given or manifest.recipe)
    if calibration:
        found = calibrated_on(found, calibration)
    if len(manifest.steps) != len(found.steps):
        raise UserError(
            f"a bundle of one recipe can be rebuilt: this one records {len(manifest.steps)} steps, the recipe"
            f" {found.name} has {len(found.steps)}"
        )
    if found.sha256 != manifest.recipe_sha256:
        raise UserError(
            f"the recipe must be the one of the manifest, {manifest.recipe_sha256[:16]}: {given or manifest.recipe} is"
            f" {found.sha256[:16]}; pass its file with --recipe"
        )
    return found


def _report(folder: Path) -> dict[str, object]:
    data: dict[str, object] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    data.pop("created", None)
    return data


def _steps(manifest: Manifest) -> list[object]:
    return [dataclasses.replace(step, seconds=0.0, peak_memory_bytes=0) for step in manifest.steps]
