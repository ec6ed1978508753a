"""The assistant: recall, refusal, the router, privacy, and what a kill leaves, on SQuAD's paragraphs and questions.

Constants were chosen and the router is fitted on questions about other articles than those tested (assistant_data.py,
assistant_fit.py). An answer counts as right when what is shown has one of the known answers in it. Everything runs on
the bundles that it makes: all-MiniLM-L6-v2 in 8 bits, and in float32 beside it, and SmolLM2-135M-Instruct in 4 bits.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from assistant_data import Asked, Remembering, questions, rows, write_paragraphs
from common import Benchmark, arguments

from edgekit.assistant.answer import Assistant, Finished, Opened, Reply, Style
from edgekit.assistant.handover import Choice, Endpoint, Log, Settings
from edgekit.assistant.index import Index
from edgekit.assistant.label import Question, is_right, label
from edgekit.assistant.logistic import calibration_error
from edgekit.assistant.privacy import Privacy
from edgekit.assistant.reading import Reading
from edgekit.assistant.router import AFTER, SHARES, Labelled, Model, encoded, evaluate, fit_router
from edgekit.assistant.search import search, terms
from edgekit.assistant.switch import Switch
from edgekit.assistant.update import update
from edgekit.assistant.vectors import Vectors
from edgekit.cli.knowledge import open_embedder
from edgekit.compress import compress
from edgekit.export.encoder import export_encoder
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.embeddings import Embedder
from edgekit.runtime.prefix import Prefixes
from edgekit.runtime.session import Session

THREADS = 2
KILLS = 5
VECTORS: tuple[Vectors, ...] = ("float", "int8", "bit")
PRIVATE = "Oxygen"  # the article whose paragraphs stand for a private folder


class Place:
    """A folder with what several sections need, each made when it is first asked for."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @cached_property
    def docs(self) -> Path:
        return write_paragraphs(self.work / "docs")

    @cached_property
    def embedder(self) -> Embedder:
        return open_embedder(None, threads=THREADS)

    @cached_property
    def index(self) -> Index:
        index = Index.open(self.work / "int8.db", self.embedder, create=True)
        update(index, self.docs)
        return index

    @cached_property
    def bundle(self) -> Path:
        bundle = self.work / "small.run"
        if not bundle.is_dir():
            compress(open_model("smollm2-135m"), load_recipe("int4"), self.work / "small", force=True)
            export(open_model(str(self.work / "small")), bundle, target=find_target(host_target()))
        return bundle

    def fresh(self, name: str) -> Path:
        """A path where nothing is of an earlier run."""
        for left in self.work.glob(f"{name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return self.work / name

    def session(self, *, context: int = 2048) -> Session:
        return Session.open(self.bundle, context=context, threads=THREADS)


def main() -> None:
    options = arguments(__doc__ or "", sections=tuple(SECTIONS))
    bench = Benchmark("assistant")
    with tempfile.TemporaryDirectory() as folder:
        kept = os.environ.get("EDGEKIT_BENCH")  # a folder in which the bundle and the index stay for the next run
        place = Place(Path(kept or folder))
        for name in options.only:
            SECTIONS[name](bench, place, options.quick)
    bench.finish(as_json=options.json)


def measure_index(bench: Benchmark, place: Place, quick: bool) -> None:
    """How long the index takes to make, and a question to be looked up in it."""
    index = Index.open(place.fresh("timed.db"), place.embedder, create=True)
    place.docs  # noqa: B018  written now
    changes = update(index, place.docs)
    assert changes.added == 2067
    bench.value("index 2,067 paragraphs", changes.seconds, "s", note=f"{THREADS} threads, {changes.passages} passages")
    again = update(index, place.docs)
    bench.value("index again, nothing changed", again.seconds, "s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bench.value("peak memory of the process while indexing", peak / 1e6, "MB", note="the embedder included")
    bench.at_most("index of 2,067 paragraphs, seconds on 2 cores", changes.seconds, 60)
    times = [search(index, asked.question).milliseconds for asked in questions("testing", 300 if quick else 1000)]
    bench.samples("query, embedding included", times, unit="ms", note=f"{THREADS} threads")
    slow = float(np.percentile(times, 99))
    bench.value("query, 99th percentile", slow, "ms", n=len(times))
    bench.at_most("query, 99th percentile, ms", slow, 30)


def measure_recalls(bench: Benchmark, place: Place, quick: bool) -> None:
    """Hybrid retrieval against its parts, with embeddings in 8 bits and in float32."""
    tested = questions("testing", 1000)
    recall = measure_recall(bench, "8 bits", place.index, tested)
    full = measure_recall(bench, "float32", float_index(place), tested)
    bench.at_least("hybrid recall@5, 1,000 questions", recall, 0.90)
    bench.at_least("recall@5 of 8-bit embeddings, less that of float32", recall - full, -0.01)


def float_index(place: Place) -> Index:
    bundle = place.fresh("float32")
    export_encoder(open_model("minilm-l6"), bundle, target=find_target(host_target()))
    index = Index.open(place.fresh("float.db"), Embedder.open(bundle, threads=THREADS), create=True, vectors="float")
    update(index, place.docs)
    return index


def documents(index: Index, numbers: list[int]) -> list[str]:
    """The first five documents of a list of passages."""
    return list(dict.fromkeys(index.entry(number).document for number in numbers))[:5]


def measure_recall(bench: Benchmark, name: str, index: Index, tested: list[Asked]) -> float:
    """The share of questions whose paragraph is among the first five: of words and vectors alone, and of both."""
    hits: dict[str, list[bool]] = {"words alone": [], "vectors alone": [], "both": []}
    for asked in tested:
        vector = index.embedder.embed([asked.question])[0]
        near = [number for number, _ in index.nearest(vector, limit=10)]
        hits["vectors alone"].append(asked.file in documents(index, near))
        hits["words alone"].append(asked.file in documents(index, index.matching(terms(asked.question), limit=10)))
        found = search(index, asked.question, limit=10)
        hits["both"].append(asked.file in list(dict.fromkeys(p.document for p in found.passages))[:5])
    for way, values in hits.items():
        share = float(np.mean(values))
        spread = float(np.sqrt(share * (1 - share) / len(values)))
        bench.value(f"recall@5, {name}, {way}", share, "", n=len(values), spread=spread)
    return float(np.mean(hits["both"]))


def measure_vectors(bench: Benchmark, place: Place, quick: bool) -> None:
    """Size, speed and recall of each way to keep vectors: of the vectors' search alone, with the same vectors."""
    tested = questions("testing", 1000)
    remembering = Remembering(place.embedder)
    for kind in VECTORS:
        path = place.fresh(f"vectors.{kind}.db")
        index = Index.open(path, remembering, create=True, vectors=kind)
        update(index, place.docs)
        hits, times = [], []
        for asked in tested:
            vector = remembering.embed([asked.question])[0]
            clock = time.perf_counter()
            near = index.nearest(vector, limit=10)
            times.append(1e3 * (time.perf_counter() - clock))
            hits.append(asked.file in documents(index, [number for number, _ in near]))
        index.close()
        bench.value(f"vectors as {kind}: recall@5 of vectors alone", float(np.mean(hits)), "", n=len(hits))
        bench.samples(f"vectors as {kind}: nearest 10", times, unit="ms")
        bench.value(f"vectors as {kind}: bytes of a vector", vector_bytes(path), "B")
        bench.value(f"vectors as {kind}: file", path.stat().st_size / 1e6, "MB", note="text and words included")


def vector_bytes(path: Path) -> float:
    """Bytes that the stored vectors take, by passage."""
    from edgekit.assistant.sqlite import connect

    db = connect(path)
    (count,) = db.execute("SELECT count(*) FROM passages").fetchone()
    (kept,) = db.execute("SELECT sum(length(vector)) FROM vectors").fetchone()
    more = db.execute("SELECT name FROM sqlite_master WHERE name = 'codes'").fetchone()
    (codes,) = db.execute("SELECT sum(length(code)) FROM codes").fetchone() if more else (0,)
    db.close()
    return float(kept + codes) / float(count)


def measure_refusal(bench: Benchmark, place: Place, quick: bool) -> None:
    """How often "I don't know" comes, asked of an index that lacks the articles of half of the questions."""
    tested = questions("testing", 1000)
    index = Index.open(place.fresh("half.db"), place.embedder, create=True)
    update(index, write_paragraphs(place.work / "half", even_only=True))
    refused = {even: [not search(index, q.question).known for q in tested if q.even == even] for even in (True, False)}
    bench.value("questions refused, article in the index", float(np.mean(refused[True])), "", n=len(refused[True]))
    bench.value("questions refused, article not in it", float(np.mean(refused[False])), "", n=len(refused[False]))


KILLED = """
import sys
from pathlib import Path
from edgekit.assistant.index import Index
from edgekit.assistant.update import update
from edgekit.cli.knowledge import open_embedder

index = Index.open(sys.argv[1], open_embedder(None, threads=2), create=True)
update(index, Path(sys.argv[2]), on_progress=lambda done, total: print(done, flush=True))
"""


def measure_kills(bench: Benchmark, place: Place, quick: bool) -> None:
    """Kill -9 during indexing: what was stored and is lost, and whether the database is whole."""
    path, chance, docs = place.fresh("killed.db"), random.Random(0), place.docs
    lost = broken = 0
    for _ in range(KILLS):
        child = subprocess.Popen([sys.executable, "-c", KILLED, path, docs], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        done, goal = 0, chance.randrange(20, 300)
        begun = kept(path)
        for line in child.stdout:
            done = int(line)
            if done >= begun + goal:
                time.sleep(chance.random() * 0.01)
                break
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        lost += max(0, done - kept(path))
        db = sqlite3.connect(path)
        broken += db.execute("PRAGMA quick_check").fetchone() != ("ok",)
        db.close()
    bench.value("documents stored before 5 kills and lost", lost, "")
    bench.at_most("finished documents lost to kill -9", lost, 0)
    bench.at_most("databases broken by kill -9", broken, 0)


def kept(path: Path) -> int:
    if not path.exists():
        return 0
    db = sqlite3.connect(path)
    try:
        return int(db.execute("SELECT count(*) FROM documents").fetchone()[0])
    finally:
        db.close()


@contextmanager
def recorder() -> Iterator[tuple[str, list[str]]]:
    """A server that answers as OpenAI's would, and what it was sent."""
    got: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "yes"}}]}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", got
        server.shutdown()


def private_texts(chance: random.Random) -> list[str]:
    """200 questions with something private in each: made up, of ten kinds, or quoted from a private folder."""

    def digits(count: int) -> str:
        return "".join(chance.choice("123456789") for _ in range(count))

    def iban() -> str:
        body = digits(18)
        return f"DE{98 - int(body + '131400') % 97:02}{body}"

    def card() -> str:
        body = "4" + digits(14)
        doubled = [int(d) if at % 2 else int(d) * 2 - 9 * (int(d) > 4) for at, d in enumerate(reversed(body))]
        return body + str(-sum(doubled) % 10)

    def grouped(number: str) -> str:
        return " ".join(number[at : at + 4] for at in range(0, len(number), 4))

    kinds = (
        lambda: f"{chance.choice(('jo', 'kim.lee', 'a_b'))}{digits(2)}@{chance.choice(('mail', 'post'))}.example",
        lambda: f"+{digits(2)} {digits(3)} {digits(7)}",
        lambda: f"({digits(3)}) {digits(3)}-{digits(4)}",
        iban,
        lambda: grouped(iban()),
        lambda: grouped(card()),
        lambda: f"{digits(3)}-{digits(2)}-{digits(4)}",
        lambda: f"the password is {chance.choice(('tulip', 'Rosebud'))}{digits(3)}",
        lambda: (
            f"{digits(3)} {chance.choice(('Maple', 'Old Mill', 'Harbour'))} {chance.choice(('Street', 'Road', 'Ave'))}"
        ),
        lambda: f"sk-{digits(24)}",
    )
    asked = [q.question for q in questions("testing", 200)]
    spread = (
        lambda text, secret: f"{text} {secret}",
        lambda text, secret: f"{secret}: {text}",
        lambda text, secret: f"{text[: len(text) // 2]} ({secret}) {text[len(text) // 2 :]}",
    )
    quoted = [row["text"][:120] for row in rows("squad_docs") if row["title"] == PRIVATE][:40]
    made = [chance.choice(spread)(text, chance.choice(kinds)()) for text in asked[:160]]
    return made + [chance.choice(spread)(text, quote) for text, quote in zip(asked[160:], quoted, strict=True)]


def measure_privacy(bench: Benchmark, place: Place, quick: bool) -> None:
    """Private texts and public questions, asked of an assistant whose router hands over whatever it may.

    Whatever arrives at the larger model is counted, word for word: that a secret is in it, or that a question with one
    got there at all.
    """
    index = place.index
    private = private_texts(random.Random(0))
    public = [q.question for q in questions("testing", 300) if not q.file.startswith(f"{PRIVATE}/")]
    assert len(set(private)) == 200
    with recorder() as (url, got):
        settings = Settings(
            Endpoint(url, "larger", seconds=10),
            Choice("", share=1.0),
            Log(str(place.fresh("log.jsonl"))),
            Privacy(folders=(PRIVATE,)),
        )
        session = place.session()
        session.go_on = lambda: False  # the answers that are made here do not matter: no model need run for them
        assistant = Assistant(session, index, router=Switch(settings, everything(index.embedder.dim), index))
        answers = {text: ask(assistant, text) for text in (*private, *public)}
    sent = [json.loads(body)["messages"][0]["content"] for body in got]
    left = sum(any(text in body for body in sent) for text in private)
    away = [text for text in private if to(answers[text]) == "elsewhere"]
    went = sum(any(text in body for body in sent) for text in public)
    kept_paragraphs = [row["text"] for row in rows("squad_docs") if row["title"] == PRIVATE]
    quoted = sum(paragraph in body for paragraph in kept_paragraphs for body in sent)
    bench.value("private texts that left", left, "", n=len(private), note=f"{len(sent)} texts arrived in all")
    bench.value("public questions that left", went / len(public), "", n=len(public), note="all of them might")
    bench.at_most("private texts of 200 that leave", max(left, len(away)), 0)
    bench.at_most("paragraphs of a private folder that leave with questions", quoted, 0)
    bench.at_least("share of public questions that leave", went / len(public), 0.95)


def ask(assistant: Assistant, question: str, **options: Any) -> Reply:
    *_, last = assistant.answer(question, **options)
    assert isinstance(last, Finished)
    return last.reply


def to(reply: Reply) -> str:
    assert reply.route is not None
    return reply.route.to


def everything(dim: int) -> Model:
    """A router that knows nothing; with a share of 1 it hands everything over."""
    chance = np.random.default_rng(0)
    examples = [
        Labelled("", at % 2 == 0, tuple(chance.standard_normal(len(AFTER)).tolist()),
                 encoded(chance.standard_normal(dim).astype(np.float32)))
        for at in range(60)
    ]  # fmt: skip
    return dataclasses.replace(fit_router(examples), thresholds=tuple((0.0, 0.0) for _ in SHARES))


def measure_prefix(bench: Benchmark, place: Place, quick: bool) -> None:
    """A whole article in the context: read by the model, and taken from disk by another session."""
    for title, paragraphs in (("Oxygen", 12), ("Oxygen", 40)):
        texts = [row["text"] for row in rows("squad_docs") if row["title"] == title][:paragraphs]
        folder = place.fresh(f"article{paragraphs}")
        folder.mkdir()
        (folder / "article.md").write_text(f"# {title}\n\n" + "\n\n".join(texts), encoding="utf-8")
        index = Index.open(place.fresh(f"whole{paragraphs}.db"), place.embedder, create=True)
        update(index, folder)
        prefixes = Prefixes(place.fresh(f"prefixes{paragraphs}"))
        read: dict[str, tuple[Reading, list[int], Reply]] = {}
        for way in ("model", "disk"):
            session = place.session(context=8192)
            assistant = Assistant(session, index, prefixes=prefixes)
            events = list(assistant.answer("Who discovered oxygen?", document="article.md", max_tokens=24))
            (reading,) = (event.reading for event in events if isinstance(event, Opened))
            assert reading.origin == way
            assert isinstance(events[-1], Finished)
            assert session.current is not None
            read[way] = reading, session.current.tokens, events[-1].reply
            note = f"{reading.tokens} tokens"
            bench.value(f"whole document, {paragraphs} paragraphs, read from {way}", reading.seconds, "s", note=note)
            bench.value(f"whole document, {paragraphs} paragraphs, answer, {way}", events[-1].reply.seconds, "s")
            del session, assistant
        (file,) = prefixes.folder.glob("*.prefix")
        bench.value(f"whole document, {paragraphs} paragraphs, kept file", file.stat().st_size / 1e6, "MB")
        same = read["model"][1] == read["disk"][1]
        bench.at_least(f"answers from the kept cache are the same, {paragraphs} paragraphs", float(same), 1)
        faster = read["model"][0].seconds / read["disk"][0].seconds
        bench.at_least(f"a kept document is there sooner, times, {paragraphs} paragraphs", faster, 5)


def measure_router(bench: Benchmark, place: Place, quick: bool) -> None:
    """Fit on labelled answers, test on as many about other articles; and what each style gets right."""
    count, index, session = 250 if quick else 500, place.index, place.session()
    quoting = Assistant(session, index, watch=True)
    parts = {}
    clock = time.perf_counter()
    for part in ("fitting", "testing"):
        parts[part] = [label(quoting, index, Question(q.question, q.answers)) for q in questions(part, count)]  # type: ignore[arg-type]
    seconds = (time.perf_counter() - clock) / (2 * count)
    right = {"quote": 1 - float(np.mean([example.wrong for example in parts["testing"]]))}
    right["write"] = share_right(session, index, "write", min(count, 100))
    for style, share in right.items():
        bench.value(f"answers right, style {style}", share, "", n=count if style == "quote" else min(count, 100))
    bench.value("seconds an answer, style quote", seconds, "s", n=2 * count, note="search included")
    model = fit_router(parts["fitting"])
    found = evaluate(model, parts["testing"], shares=(0.1, 0.2, 0.3, 0.4, 0.5))
    for share, caught, kept_right in zip(found.curve.shares, found.curve.caught, found.curve.right_here, strict=True):
        bench.value(f"wrong answers caught at {share:.0%} handed over", caught, "", n=int(found.wrong.sum()))
        bench.value(f"answers right among those kept at {share:.0%}", kept_right, "", n=count)
    first, second = model.threshold(0.3)
    gone = (found.before >= first) | (found.after >= second)
    bench.value("share handed over by the thresholds for 30%", float(gone.mean()), "", n=count)
    bench.value("wrong answers caught by them", float(found.wrong[gone].sum() / found.wrong.sum()), "", n=count)
    bench.value("handed over before a draft", float((found.before >= first).mean()), "", n=count)
    bench.value("calibration error of the router", calibration_error(found.after, found.wrong), "", n=count)
    bench.at_least("share of wrong answers caught at 30% handed over", found.curve.caught[2], 0.60)


def share_right(session: Session, index: Index, style: Style, count: int) -> float:
    assistant = Assistant(session, index, style=style)
    asked = questions("testing", count)
    return float(np.mean([is_right(ask(assistant, q.question, max_tokens=64).text, q.answers) for q in asked]))


SECTIONS: dict[str, Callable[[Benchmark, Place, bool], None]] = {
    "index": measure_index,
    "recall": measure_recalls,
    "vectors": measure_vectors,
    "refusal": measure_refusal,
    "kills": measure_kills,
    "privacy": measure_privacy,
    "prefix": measure_prefix,
    "router": measure_router,
}


if __name__ == "__main__":
    main()
