"""One small protocol for everything that can be evaluated: token ids in, logits out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from edgekit.bundle import SPEC
from edgekit.manifest import NAME
from edgekit.runtime.session import Session
from edgekit.runtime.template import ChatTemplate
from edgekit.weight import Floats


class Sequencer(Protocol):
    """Holds one token sequence and gives logits for what is appended: `edgekit.runtime.engine.Engine`, or a peer."""

    tokens: list[int]
    context: int

    def forward(self, ids: Sequence[int], *, keep: int = 1) -> Floats:
        """Append `ids`; the logits after the last `keep` of them, (keep, vocabulary)."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


@dataclass(frozen=True)
class Scorer:
    """A model under evaluation: `name` for the report, the model, its tokenizer, and what it ends an answer with."""

    name: str
    model: Sequencer
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    eos_ids: tuple[int, ...] = ()


@contextlib.contextmanager
def open_scorer(
    spec: str,
    *,
    context: int | None = None,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Iterator[Scorer]:
    """Open a bundle, or any model source: that one is run in float32 through a graph in a temporary folder.

    `on_progress` is told each stage. Raises what `Session.open`, `open_model` and `export` raise.
    """
    if all(os.path.isfile(os.path.join(spec, name)) for name in (NAME, SPEC)):
        session = Session.open(spec, context=context, threads=threads)
        yield _scorer(Path(spec).resolve().name, session)
        return
    from edgekit.export.export import export
    from edgekit.export.targets import find_target
    from edgekit.model.sources import open_model

    checkpoint = open_model(spec, progress=on_progress)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        bundle = Path(folder) / "bundle"
        export(checkpoint, bundle, target=find_target("portable"), on_progress=on_progress)
        session = Session.open(bundle, context=context, threads=threads)
        yield _scorer(checkpoint.source.name, session)


def _scorer(name: str, session: Session) -> Scorer:
    return Scorer(name, session.engine, session.tokenizer, session.template, session.bundle.spec.eos_ids)
