"""What the commands of the assistant share: where an embedder and an index come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.assistant.index import Index
    from edgekit.assistant.update import Changes
    from edgekit.runtime.embeddings import Embedder
    from edgekit.runtime.prefix import Prefixes

F = TypeVar("F", bound=Callable[..., Any])
EMBEDDER = "minilm-l6"
RECIPE = "encoder"

embedder_option: Callable[[F], F] = click.option(
    "--embedder",
    type=click.Path(path_type=Path),
    envvar="EDGEKIT_EMBEDDER",
    help="Encoder bundle (or $EDGEKIT_EMBEDDER); default: minilm-l6 in 8 bits, made once.",
)


def open_embedder(path: Path | None, *, threads: int | None, quiet: bool = False) -> Embedder:
    """The encoder bundle of that path, or the default one, which is made at the first use.

    Raises UserError where it cannot be made: that needs the extra convert, and minilm-l6 or a network to fetch it by.
    """
    from edgekit.runtime.embeddings import Embedder

    return Embedder.open(path or _default_embedder(quiet=quiet), threads=threads)


def open_knowledge(docs: Path, embedder: Embedder, *, quiet: bool = False) -> tuple[Index, Changes | None]:
    """The index of a file; or that of a folder, which lies in the cache and is brought up to date first."""
    from edgekit.assistant.index import Index
    from edgekit.assistant.update import update
    from edgekit.cli.terminal import progress

    if not docs.is_dir():
        return Index.open(docs, embedder), None
    name = hashlib.sha256(str(docs.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = _cache() / "indexes" / f"{name}.db"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    index = Index.open(path, embedder, create=True)
    with progress("reading documents", quiet=quiet) as tell:
        return index, update(index, docs, on_progress=tell)


def open_prefixes() -> Prefixes:
    """What the model has read of whole documents, kept in the cache."""
    from edgekit.runtime.prefix import Prefixes

    return Prefixes(_cache() / "prefixes")


def _cache() -> Path:
    from edgekit.model.builtin import cache_folder

    return cache_folder()


def _default_embedder(*, quiet: bool) -> Path:
    from edgekit.cli.terminal import stages

    try:
        from edgekit.compress import compress
        from edgekit.export.encoder import export_encoder
        from edgekit.export.targets import find_target, host_target
        from edgekit.model.sources import open_model
        from edgekit.recipe import load_recipe
    except ImportError as problem:
        raise UserError(
            f'an embedder must be given where it cannot be made: {problem.name} is not installed; pip install "edgekit'
            '[convert]", or make one elsewhere (docs/encoders.md) and pass --embedder'
        ) from problem
    target = host_target()
    made = _cache() / f"{EMBEDDER}.{target}"
    if not made.is_dir():
        with stages(f"making the embedder {made.name}, once", quiet=quiet) as tell:
            small = made.with_name(f"{made.name}.{os.getpid()}.checkpoint")
            try:
                compress(open_model(EMBEDDER, progress=tell), load_recipe(RECIPE), small)
                export_encoder(open_model(str(small)), made, target=find_target(target))
            finally:
                _discard(small)
    return made


def _discard(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
