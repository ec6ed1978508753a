"""Whether a deployed bundle is well: it answers by itself, or a command of the user's says so."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import numpy as np

from edgekit.bundle import is_encoder_bundle
from edgekit.deploy.store import Health
from edgekit.errors import DeviceError, ModelError, UserError


def answers(folder: Path) -> None:
    """Open the bundle and run it on a few tokens. Raises what opening raises, ModelError: no finite numbers."""
    if is_encoder_bundle(folder):
        from edgekit.runtime.embeddings import Embedder

        values = Embedder.open(folder).embed(["Is this thing on?"])
    else:
        from edgekit.runtime.session import Session

        session = Session.open(folder, context=None)
        values = session.engine.forward(session.encode("Is this thing on?")[: session.engine.context])
    if not np.isfinite(np.asarray(values)).all():
        raise ModelError(f"a bundle must give finite numbers: {folder} does not; export it again")


def command(line: str, *, seconds: float) -> Health:
    """A health check by a command, which finds the bundle's folder in $EDGEKIT_BUNDLE; no shell reads it.

    The check raises DeviceError: the command ended with another status than 0, or took longer than `seconds`.
    """
    words = shlex.split(line)
    if not words:
        raise UserError("a health check must be a command: got an empty one")

    def check(folder: Path) -> None:
        try:
            done = subprocess.run(  # noqa: S603  the user's own command
                words,
                env=os.environ | {"EDGEKIT_BUNDLE": str(folder)},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except OSError as problem:
            raise DeviceError(f"the health check must be a program: {words[0]} ({problem.strerror})") from problem
        except subprocess.TimeoutExpired as problem:
            raise DeviceError(f"the health check must end within {seconds:g} s: {words[0]} did not") from problem
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-200:]
            raise DeviceError(f"the health check failed with status {done.returncode}: {said}")

    return check
