"""Bundles and checkpoints as a model of lm-evaluation-harness: `edgekit`.

    python -m edgekit.evaluate.harness --model edgekit --model_args target=small.x86 --tasks mine --include_path tasks

is `lm_eval` with our model registered. A pair of context and continuation is split into tokens as in
`edgekit.evaluate.choices`, which follows the harness; a text without context begins with the end-of-text token, as in
its Hugging Face backend. One sequence at a time; answers are greedy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import lm_eval.api.model
from lm_eval.api.registry import register_model

from edgekit.errors import UserError
from edgekit.evaluate.choices import score
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.evaluate.scorer import Scorer, open_scorer


@register_model("edgekit")
class Harness(lm_eval.api.model.LM):  # type: ignore[misc]
    """`target` is a bundle or any model source; the other arguments are what the harness passes to every model."""

    def __init__(
        self,
        target: str = "",
        *,
        context: int | None = None,
        threads: int | None = None,
        scorer: Scorer | None = None,
        batch_size: object = 1,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        if scorer is None:
            if not target:
                raise UserError("the harness needs a model: pass --model_args target=BUNDLE")
            scorer = self._stack.enter_context(open_scorer(str(target), context=context, threads=threads))
        self.scorer = scorer

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises UserError: the model has no template."""
        if self.scorer.template is None:
            raise UserError(f"--apply_chat_template needs a chat template: {self.scorer.name} has none")
        return self.scorer.template.render(chat_history)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, greedy) of each (context, continuation)."""
        found = []
        for request in requests:
            context, continuation = request.args
            if context:
                found.append(score(self.scorer, context, continuation))
            else:
                found.append(self._from_start(continuation))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in windows of the model's context that do not overlap but for a first token."""
        return [self._from_start(request.args[0])[0] for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each context, up to the first of the stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _from_start(self, text: str) -> tuple[float, bool]:
        model, tokens = self.scorer.model, self.scorer.tokenizer.encode(text).ids
        before, total, greedy = self._first(), 0.0, True
        for begin in range(0, len(tokens), model.context):
            targets = tokens[begin : begin + model.context]
            model.rewind(0)
            logits = model.forward([before, *targets[:-1]], keep=len(targets))
            total += float(log_likelihoods(logits, targets).sum())
            greedy = greedy and logits.argmax(-1).tolist() == targets
            before = targets[-1]
        return total, greedy

    def _first(self) -> int:
        added: list[int] = self.scorer.tokenizer.encode("", add_special_tokens=True).ids
        if not added and not self.scorer.eos_ids:
            raise UserError(f"a text without context needs a token to begin with: {self.scorer.name} has none")
        return added[0] if added else self.scorer.eos_ids[0]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or float(options.get("temperature") or 0) > 0:
            raise UserError("the edgekit model answers greedily: set do_sample to false and temperature to 0")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        scorer, limit = self.scorer, int(options.get("max_gen_toks", 256))
        ids = scorer.tokenizer.encode(context).ids[-(scorer.model.context - limit) :]
        if not ids:
            raise UserError(f"max_gen_toks must leave room for the context of {scorer.model.context}: got {limit}")
        scorer.model.rewind(0)
        logits = scorer.model.forward(ids)
        written: list[int] = []
        text = ""
        while len(written) < limit:
            token = int(logits[-1].argmax())
            if token in scorer.eos_ids:
                break
            written.append(token)
            text = str(scorer.tokenizer.decode(written))
            if cuts := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(cuts)]
            if len(written) < limit:
                logits = scorer.model.forward([token])
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
