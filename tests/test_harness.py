"""Our model in lm-evaluation-harness against its Hugging Face backend, on the same tiny checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_folder

from edgekit.evaluate.scorer import open_scorer

PAIRS = [("The quick brown", " fox"), ("A small model ", "runs"), ("", "The device in your hand"), ("x", " y z")]


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.slow
def test_it_gives_the_numbers_of_the_hugging_face_backend(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from edgekit.evaluate.harness import Harness

    tiny_folder(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model" / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=128)
    asked = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(PAIRS)]
    expected = peer.loglikelihood(asked, disable_tqdm=True)
    with open_scorer(str(tmp_path / "model"), context=128) as scorer:
        ours = Harness(scorer=scorer)
        found = ours.loglikelihood(requests(*PAIRS))
        assert ours.generate_until(requests(("The quick", {"until": ["\n"], "max_gen_toks": 4})))
    for (sum_a, greedy_a), (sum_b, greedy_b) in zip(found, expected, strict=True):
        assert sum_a == pytest.approx(sum_b, abs=1e-3)
        assert greedy_a == greedy_b
