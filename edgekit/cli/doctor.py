"""`edgekit doctor`: what this installation can do here, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import click

from edgekit import __version__
from edgekit.cli.terminal import json_option, output, print_json, size

EXTRAS = {
    "convert": ("onnx", "safetensors", "gguf", "huggingface_hub", "ml_dtypes"),
    "compress": ("torch", "transformers"),
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this installation and this machine.

    \b
    edgekit doctor
    """
    from edgekit.host import host_device
    from edgekit.profile.memory import available_bytes

    host = host_device()
    available = available_bytes()
    missing = {name: [p for p in packages if importlib.util.find_spec(p) is None] for name, packages in EXTRAS.items()}
    facts = {
        "edgekit": __version__,
        "python": platform.python_version(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "kernels": "stock onnxruntime",
        "machine": host.title,
        "threads": str(host.threads or "unknown"),
        "features": " ".join(sorted(host.isa)) or "unknown",
        "memory available": "unknown" if available is None else size(available),
    }
    for name, packages in missing.items():
        facts[f"extra [{name}]"] = (
            f"missing {', '.join(packages)}: pip install 'edgekit[{name}]'" if packages else "ready"
        )
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        output().print(f"{key:<20}{value}", markup=False)
