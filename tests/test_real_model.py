"""The real model, end to end: SmolLM2-135M-Instruct from its GGUF file, against transformers' own loading of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.evaluate.scorer import open_scorer
from edgekit.export.export import export
from edgekit.export.parity import PROMPTS
from edgekit.export.targets import find_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.runtime.engine import Engine

pytestmark = pytest.mark.slow


def test_logits_equal_transformers_loading_of_the_same_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = fetch_builtin("smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    checkpoint = open_model("smollm2-135m")
    with open_scorer("smollm2-135m") as scorer:
        sequences = [scorer.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    export(checkpoint, tmp_path / "bundle", target=find_target("portable"))
    spec = Bundle.open(tmp_path / "bundle").spec
    engine = Engine(tmp_path / "bundle" / "model.onnx", spec, context=256, threads=2)
    for ids, ours in zip(sequences, forward(checkpoint, sequences), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        engine.rewind(0)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3)
        np.testing.assert_allclose(engine.forward(ids, keep=len(ids)), expected, rtol=0, atol=2e-3)
