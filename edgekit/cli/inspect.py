"""`edgekit inspect`: what is inside a model, a checkpoint or a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.terminal import json_option, output, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from edgekit.manifest import Manifest


@click.command()
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Show where MODEL comes from, what was done to it, and what it is made of.

    \b
    edgekit inspect small
    """
    from edgekit.manifest import NAME, Manifest

    path = Path(model)
    manifest = Manifest.load(path) if (path / NAME).is_file() else None
    if manifest is not None and manifest.kind == "bundle":
        from edgekit.bundle import Bundle

        bundle = Bundle.open(path)
        if as_json:
            print_json(
                {"manifest": json.loads((path / NAME).read_text()), "runtime": json.loads(bundle.spec.to_json())}
            )
            return
        _print_history(manifest)
        spec = bundle.spec
        output().print(
            f"{spec.architecture} for {spec.target}: {len(spec.layers)} layers, vocabulary {spec.vocabulary},"
            f" context {spec.context_length}, cache {size(spec.cache_bytes(1))} a token"
        )
        return
    _inspect_checkpoint(model, manifest, as_json=as_json)


def _inspect_checkpoint(model: str, manifest: Manifest | None, *, as_json: bool) -> None:
    from edgekit.model.sources import open_model

    checkpoint = open_model(model)
    rows = []
    for block, (matrices, _) in checkpoint.blocks.items():
        for module in matrices:
            entry = checkpoint.structure.get(module)
            stored = f"{entry.bits} bits, block {entry.block}" if entry else "float"
            rows.append((block, module, checkpoint.shape(module), stored))
    if as_json:
        print_json(
            {
                "source": {"name": checkpoint.source.name, "kind": checkpoint.source.kind},
                "config": checkpoint.config,
                "matrices": [
                    {"block": block, "module": module, "shape": shape, "stored": stored}
                    for block, module, shape, stored in rows
                ],
            }
        )
        return
    if manifest is not None:
        _print_history(manifest)
    else:
        output().print(f"{checkpoint.source.name} ({checkpoint.source.kind}), licence {checkpoint.source.license}")
    output().print(_table(rows))
    total = sum(rows * columns for _, _, (rows, columns), _ in rows)
    output().print(f"{total / 1e6:.1f} million parameters in {len(rows)} matrices")


def _table(rows: list[tuple[str, str, tuple[int, int], str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("matrix", "out", "in", "stored"):
        table.add_column(heading, justify="right" if heading in ("out", "in") else "left")
    for _, module, (out, columns), stored in rows:
        table.add_row(module, str(out), str(columns), stored)
    return table


def _print_history(manifest: Manifest) -> None:
    source = manifest.source
    output().print(f"{manifest.kind} from {source.name} ({source.kind}), licence {source.license}", markup=False)
    output().print(f"source {source.digest[:12]}, recipe {manifest.recipe or 'none'}, written {manifest.created}")
    for step in manifest.steps:
        output().print(
            f"  {step.step}: {step.changed} matrices, {size(step.before_bytes)} -> {size(step.after_bytes)}",
            markup=False,
        )
    for row in manifest.measurements:
        value = "n/a" if row.value is None else f"{row.value:.4g}"
        output().print(f"  {row.name}: {value} {row.unit} {row.note}".rstrip(), markup=False)
