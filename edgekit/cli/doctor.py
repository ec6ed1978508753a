"""`edgekit doctor`: what this installation can do here, and what is missing for the rest."""

from __future__ import annotations

import click

from edgekit.cli.terminal import json_option, print_json, size

EXTRAS = {
    "convert": ("onnx", "safetensors", "gguf", "huggingface_hub", "ml_dtypes"),
    "compress": ("torch", "transformers"),
    "assistant": ("sqlite_vec", "pypdf", "llguidance", "starlette", "uvicorn"),
}


@click.command(short_help="Check this installation and this machine.")
@json_option
def doctor(as_json: bool) -> None:
    """Check what this installation can do here, and what is missing for the rest.

    \b
    edgekit doctor
    """
    from importlib.util import find_spec

    from edgekit.host import host_device
    from edgekit.kernels.library import status
    from edgekit.manifest import versions
    from edgekit.profile.memory import available_bytes

    host, available = host_device(), available_bytes()
    found = versions("onnxruntime", "numpy", "tokenizers")
    missing = {extra: [name for name in packages if find_spec(name) is None] for extra, packages in EXTRAS.items()}
    if as_json:
        print_json(
            {
                "versions": found,
                "kernels": status(),
                "machine": host.fingerprint(),
                "threads": host.threads,
                "memory_available_bytes": available,
                "missing": missing,
            }
        )
        return
    lines = {
        **found,
        "kernels": status(),
        "machine": f"{host.title}, {host.arch}",
        "threads": str(host.threads or "unknown"),
        "features": " ".join(sorted(host.isa)) or "unknown",
        "memory available": "unknown" if available is None else size(available),
    }
    for extra, packages in missing.items():
        cure = f"missing {', '.join(packages)}: pip install 'edgekit[{extra}]'"
        lines[f"extra [{extra}]"] = cure if packages else "ready"
    for key, value in lines.items():
        click.echo(f"{key:<20}{value}")
