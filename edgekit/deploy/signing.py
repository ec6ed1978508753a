"""Ed25519 signatures of bundles, detached: `edgekit.json.sig` beside the manifest.

What is signed is the manifest's bytes after a line that says what they are. The manifest holds the sha256 of every
other file, so one signature covers the whole bundle. A private key is a PKCS#8 PEM file of mode 0600, a public key a
PEM file; both are what `openssl pkey` reads.
Source: RFC 8032; the `cryptography` package does the arithmetic.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import ModelError, UserError
from edgekit.folder import explain_write_errors, write_file
from edgekit.manifest import NAME

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = f"{NAME}.sig"
PREFIX = b"edgekit bundle manifest, version 1\n"
LONGEST = 4096  # bytes of a signature file


def new_key(private: Path, public: Path) -> None:
    """Make a pair of keys. Raises UserError: a file of this name exists, or cannot be written."""
    _require()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    for path in (private, public):
        if path.exists():
            raise UserError(f"a new key must not replace a file: {path} exists; choose another name")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    with explain_write_errors(private):
        handle = os.open(private, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(secret)
        write_file(public, key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))


def sign(folder: Path, private: Path) -> None:
    """Sign the manifest of `folder`. Raises UserError: the key cannot be read."""
    key = _private(private)
    signature = key.sign(PREFIX + (folder / NAME).read_bytes())
    text = json.dumps({"algorithm": "ed25519", "signature": base64.b64encode(signature).decode()}, indent=1)
    with explain_write_errors(folder):
        write_file(folder / SIGNATURE, text.encode())


def verify(folder: Path, trusted: Sequence[Path]) -> Path:
    """The trusted public key that signed the manifest of `folder`. Raises ModelError: none did."""
    signature = _signature(folder)
    message = PREFIX + (folder / NAME).read_bytes()
    from cryptography.exceptions import InvalidSignature

    for path in trusted:
        try:
            public_key(path).verify(signature, message)
        except InvalidSignature:
            continue
        return path
    names = ", ".join(path.name for path in trusted) or "none"
    raise ModelError(f"a bundle must be signed by a trusted key: {folder} is not by any of {names}; do not use it")


def public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key. Raises UserError: it is none."""
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise UserError(f"a public key must be a readable PEM file: {path} ({problem})") from problem
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"a public key must be ed25519: {path} is another kind; make one with edgekit sign --new-key")
    return key


def _private(path: Path) -> Ed25519PrivateKey:
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(
            f"a private key must be a readable PEM file without a password: {path} ({problem})"
        ) from problem
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"a private key must be ed25519: {path} is another kind; make one with edgekit sign --new-key")
    return key


def _signature(folder: Path) -> bytes:
    path = folder / SIGNATURE
    try:
        with path.open("rb") as stream:
            data: Any = json.loads(stream.read(LONGEST))
        if data["algorithm"] != "ed25519":
            raise ValueError(f"algorithm {data['algorithm']!r:.40}")
        return base64.b64decode(data["signature"], validate=True)
    except FileNotFoundError:
        raise ModelError(f"a bundle must be signed where keys are set: {folder} has no {SIGNATURE}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise ModelError(f"{path} must be a signature of ours: {problem}; sign the bundle again") from problem


def _require() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as problem:
        raise UserError('signatures need cryptography: pip install "edgekit[deploy]"') from problem
