"""Our model in lm-evaluation-harness against its Hugging Face backend, on the same tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import CORPUS, tiny_folder

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


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
{choices}
metric_list: [{{metric: acc}}{norm}]
"""


def write_tasks(folder: Path) -> None:
    """A task of choices and one of last words, over local files."""
    words = CORPUS[0].split()
    rows = [{"context": " ".join(words[:at]), "choices": words[at : at + 3], "answer": 0} for at in range(2, 14)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"data": str(folder / "rows.jsonl")}
    choices = TASK.format(
        name="tiny_choices", kind="multiple_choice", target="answer", choices="doc_to_choice: choices",
        norm=", {metric: acc_norm}", **facts,
    )  # fmt: skip
    last = TASK.format(
        name="tiny_last", kind="loglikelihood", target='" {{choices[0]}}"', choices="", norm=", {metric: perplexity}",
        **facts,
    )  # fmt: skip
    (folder / "tiny_choices.yaml").write_text(choices)
    (folder / "tiny_last.yaml").write_text(last)


def lm_eval(module: str, model: str, arguments: str, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The results of lm_eval's command line, and the log-likelihoods of all its requests."""
    words = [sys.executable, "-m", module, "--model", model, "--model_args", arguments, "--include_path", str(folder)]
    words += ["--tasks", "tiny_choices,tiny_last", "--output_path", str(folder / model), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [*words, "--device", "cpu", "--batch_size", "1"], env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (folder / model).rglob("results_*.json")
    requests = []
    for path in sorted((folder / model).rglob("samples_*.jsonl")):
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        requests += [pair for row in rows for answer in row["resps"] for pair in answer]
    found = {
        f"{task}: {name}": value
        for task, row in json.loads(results.read_text())["results"].items()
        for name, value in row.items()
        if isinstance(value, float) and "stderr" not in name
    }
    return found, requests


@pytest.mark.slow
def test_the_command_line_gives_what_the_hugging_face_backend_gives(tmp_path: Path) -> None:
    for package in ("lm_eval", "torch", "datasets"):
        pytest.importorskip(package)
    model = tiny_folder(tmp_path / "model", config={"eos_token_id": 2})
    write_tasks(tmp_path)
    theirs, expected = lm_eval("lm_eval", "hf", f"pretrained={model},dtype=float32", tmp_path)
    ours, found = lm_eval("edgekit.evaluate.harness", "edgekit", f"target={model}", tmp_path)
    assert {"tiny_choices: acc,none", "tiny_choices: acc_norm,none", "tiny_last: perplexity,none"} <= set(theirs)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(found) == len(expected) == 12 * 4
    for (sum_a, greedy_a), (sum_b, greedy_b) in zip(found, expected, strict=True):
        assert float(sum_a) == pytest.approx(float(sum_b), abs=1e-3)
        assert greedy_a == greedy_b
