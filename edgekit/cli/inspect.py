"""`edgekit inspect`: what is inside a model, a checkpoint or a bundle."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.terminal import json_option, output, print_json, size, stages

if TYPE_CHECKING:
    from edgekit.bundle import EncoderBundle
    from edgekit.checkpoint import Checkpoint
    from edgekit.manifest import Manifest

Row = tuple[str, int, int, str]  # module, out, in, how it is stored


@click.command(short_help="Show what a model, checkpoint or bundle is made of.")
@click.argument("model")
@click.option("--entanglement", is_flag=True, help="Show how far each matrix could be cut (edgekit.tn.entanglement).")
@click.option("--similarity", is_flag=True, help="Show how alike its layers are (edgekit.merge.similarity).")
@click.option(
    "--calibration", type=click.Path(path_type=Path), multiple=True, help="With text: of what is really read."
)
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="Write its heat map to a .png or .html file.")
@json_option
def inspect(
    model: str,
    entanglement: bool,
    similarity: bool,
    calibration: tuple[Path, ...],
    map_file: Path | None,
    as_json: bool,
) -> None:
    """Show where MODEL comes from, what was done to it, and what it is made of.

    \b
    edgekit inspect small
    """
    if entanglement:
        _inspect_entanglement(model, calibration, map_file, as_json=as_json)
        return
    if similarity:
        _inspect_similarity(model, calibration, map_file, as_json=as_json)
        return
    if calibration or map_file:
        raise click.UsageError("--calibration and --map belong to --entanglement and --similarity")
    from edgekit.manifest import NAME, Manifest

    ours = os.path.isfile(os.path.join(model, NAME))
    if ours and Manifest.load(Path(model), verify=False).kind == "bundle":
        _inspect_bundle(Path(model), as_json=as_json)
    else:
        _inspect_checkpoint(model, as_json=as_json)


def _inspect_bundle(path: Path, *, as_json: bool) -> None:
    from edgekit.bundle import Bundle, EncoderBundle, is_encoder_bundle

    if is_encoder_bundle(path):
        _inspect_encoder(EncoderBundle.open(path), as_json=as_json)
        return
    bundle = Bundle.open(path)
    spec = bundle.spec
    if as_json:
        print_json({"manifest": dataclasses.asdict(bundle.manifest), "runtime": dataclasses.asdict(spec)})
        return
    _print_history(bundle.manifest)
    _print(
        f"{spec.architecture} for {spec.target}: {len(spec.layers)} layers, vocabulary {spec.vocabulary},"
        f" context {spec.context_length}, cache {size(spec.token_bytes)} a token ({spec.cache_name})"
    )


def _inspect_encoder(bundle: EncoderBundle, *, as_json: bool) -> None:
    spec = bundle.spec
    if as_json:
        print_json({"manifest": dataclasses.asdict(bundle.manifest), "runtime": dataclasses.asdict(spec)})
        return
    _print_history(bundle.manifest)
    _print(
        f"{spec.architecture} for {spec.target}: embeddings of {spec.dim} numbers ({spec.pooling}), texts of"
        f" at most {spec.max_length} tokens"
    )


def _inspect_checkpoint(model: str, *, as_json: bool) -> None:
    from edgekit.model.sources import open_model

    with stages("opening the model", quiet=as_json) as tell:
        checkpoint = open_model(model, progress=tell)
        rows = _matrices(checkpoint)
    manifest = checkpoint.manifest
    if as_json:
        print_json(
            {
                "manifest": manifest and dataclasses.asdict(manifest),
                "source": dataclasses.asdict(checkpoint.source),
                "config": checkpoint.config,
                "matrices": [dict(zip(("module", "out", "in", "stored"), row, strict=True)) for row in rows],
            }
        )
        return
    if manifest is not None:
        _print_history(manifest)
    else:
        _print(f"{checkpoint.source.name} ({checkpoint.source.kind}), licence {checkpoint.source.license}")
    _print_table(rows)
    total = sum(out * columns for _, out, columns, _ in rows)
    _print(f"{total / 1e6:.1f} million parameters in {len(rows)} matrices")


def _inspect_entanglement(model: str, calibration: tuple[Path, ...], map_file: Path | None, *, as_json: bool) -> None:
    from rich.table import Table

    from edgekit.model.sources import open_model
    from edgekit.report import plain
    from edgekit.step import CalibrationOptions
    from edgekit.tn.entanglement import survey_entanglement, write_map

    with stages("opening the model", quiet=as_json) as tell:
        checkpoint = open_model(model, progress=tell)
        text = CalibrationOptions(tuple(map(str, calibration)), samples=8) if calibration else None
        rows = survey_entanglement(checkpoint, text, on_block=lambda done, total: tell(f"layer {done} of {total}"))
    if map_file is not None:
        write_map(rows, map_file, title=f"Entanglement of {checkpoint.source.name}")
    if as_json:
        print_json({"entanglement": [dataclasses.asdict(row) for row in rows]})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("matrix", "cut", "dimension", "entropy", "effective rank", "holds 99 %"):
        table.add_column(heading, justify="left" if heading in ("matrix", "cut") else "right")
    for row in rows:
        numbers = (str(row.dimension), f"{row.entropy:.2f}", f"{row.effective_rank:.1f}", str(row.rank99))
        table.add_row(plain(row.module), row.cut, *numbers)
    output().print(table)


def _inspect_similarity(model: str, calibration: tuple[Path, ...], map_file: Path | None, *, as_json: bool) -> None:
    from edgekit.errors import UserError
    from edgekit.merge.similarity_map import survey_similarity, write_similarity_map
    from edgekit.model.sources import open_model

    if not calibration:
        raise UserError("layers are compared on a text: name one with --calibration")
    with stages("opening the model", quiet=as_json) as tell:
        checkpoint = open_model(model, progress=tell)
        files = tuple(map(str, calibration))
        tables = survey_similarity(checkpoint, files, report=lambda done, total: tell(f"layer {done} of {total}"))
    if map_file is not None:
        write_similarity_map(tables, map_file, title=f"Similarity of the layers of {checkpoint.source.name}")
    if as_json:
        print_json({"similarity": {measure: table.tolist() for measure, table in tables.items()}})
        return
    _print(f"{'layers':<10}" + "".join(f"{measure:>14}" for measure in tables))
    for second in range(1, checkpoint.decoder.layers):
        values = "".join(f"{table[second - 1, second]:>14.4f}" for table in tables.values())
        _print(f"{second - 1:>3} {second:>3}   {values}")


def _matrices(checkpoint: Checkpoint) -> list[Row]:
    rows = []
    for matrices, _ in checkpoint.blocks.values():
        for module in matrices:
            entry = checkpoint.structure.get(module)
            stored = "float"
            if entry is not None and entry.kind == "factored":
                shapes = " x ".join(
                    f"({out} x {columns})" for out, columns in map(checkpoint.shape, checkpoint.parts(module))
                )
                stored = f"factors {shapes}"
            elif entry is not None:
                stored = f"{entry.bits} bits, block {entry.block}"
            rows.append((module, *checkpoint.shape(module), stored))
    return rows


def _print_table(rows: list[Row]) -> None:
    from rich.table import Table

    from edgekit.report import plain

    table = Table(box=None, pad_edge=False)
    for heading in ("matrix", "out", "in", "stored"):
        table.add_column(heading, justify="right" if heading in ("out", "in") else "left")
    for module, out, columns, stored in rows:
        table.add_row(plain(module), str(out), str(columns), stored)
    output().print(table)


def _print_history(manifest: Manifest) -> None:
    source = manifest.source
    _print(f"{manifest.kind} from {source.name} ({source.kind}), licence {source.license}")
    _print(f"source {source.digest[:12]}, recipe {manifest.recipe or 'none'}, written {manifest.created}")
    for step in manifest.steps:
        _print(f"{step.step}: {step.changed} matrices, {size(step.before_bytes)} -> {size(step.after_bytes)}", indent=2)
    for row in manifest.measurements:
        value = "n/a" if row.value is None else f"{row.value:.4g}"
        _print(f"{row.name}: {value} {row.unit} {row.note}", indent=2)


def _print(line: str, *, indent: int = 0) -> None:
    """Print a line in which foreign text cannot steer the terminal."""
    from edgekit.report import plain

    click.echo(" " * indent + plain(line))
