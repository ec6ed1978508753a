"""The router at work: its settings, its model and the privacy rules, asked at the two points of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekit.assistant import router
from edgekit.assistant.evidence import Quote
from edgekit.assistant.handover import Handover, Settings, Unreachable, load_settings
from edgekit.assistant.index import Index
from edgekit.assistant.privacy import Rules
from edgekit.assistant.router import Decision, Draft, Model
from edgekit.assistant.search import Found


class Switch:
    """Decides, and hands over where it decides so. Where there is none, all answers are made here."""

    def __init__(self, settings: Settings, model: Model, index: Index) -> None:
        self.settings = settings
        self._model = model
        self._index = index
        self._rules = Rules(settings.privacy)
        self._door = Handover(settings.endpoint, Path(settings.log.path), self._rules, index)
        self._bars = dict(zip(("before", "after"), model.threshold(settings.router.share), strict=True))

    @classmethod
    def open(cls, path: Path, index: Index) -> Switch:
        """The router of a settings file. Raises UserError or ModelError for a file that is wrong."""
        settings = load_settings(path)
        return cls(settings, router.load(Path(settings.router.model)), index)

    def private(self, question: str, found: Found) -> str | None:
        """Why a question must stay here; None when it may leave."""
        documents = [passage.document for passage in found.passages]
        return self._rules.reason([question], documents, index=self._index)

    def decide(self, question: str, found: Found, quotes: Sequence[Quote], draft: Draft | None) -> Decision:
        """Where the answer comes from, before there is a draft (None) or after. It says nothing on privacy."""
        vector = self._index.embedder.embed([question or " "], truncate=True)[0]
        wrong = router.predicted(self._model, router.features(question, found, quotes, draft), vector)
        stage = "before" if draft is None else "after"
        bar = self._bars[stage]
        if wrong >= bar:
            reason = f"the answer made here is probably wrong ({wrong:.0%}, limit {bar:.0%})"
            return Decision("elsewhere", stage, reason, wrong, self.settings.endpoint.url)  # type: ignore[arg-type]
        return Decision("here", stage, f"the answer made here is probably right ({1 - wrong:.0%})", wrong)  # type: ignore[arg-type]

    def ask(self, question: str, found: Found, decision: Decision) -> tuple[str, Decision]:
        """The larger model's answer, and the decision; "" and why it stays here when there is none."""
        passages = found.passages if self.settings.router.sources else ()
        try:
            text = self._door.ask(
                question, [p.text for p in passages], [p.document for p in passages], wrong=decision.wrong
            )
        except Unreachable as problem:
            return "", Decision("here", decision.stage, str(problem), decision.wrong)
        return text, decision
