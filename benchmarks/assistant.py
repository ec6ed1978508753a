"""The assistant: recall, refusal, the router, privacy, and what a kill leaves, on SQuAD's paragraphs and questions.

Constants were chosen and the router is fitted on questions about other articles than those tested (assistant_data.py,
assistant_fit.py). An answer counts as right when what is shown has one of the known answers in it. Everything runs on
the bundles that it makes: all-MiniLM-L6-v2 in 8 bits, and in float32 beside it, and SmolLM2-135M-Instruct in 4 bits.
"""

from __future__ import annotations

import http.server
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from assistant_data import Asked, Remembering, file_name, questions, rows, write_paragraphs
from common import Benchmark, arguments

from edgekit.assistant.answer import Assistant, Finished, Style
from edgekit.assistant.handover import Endpoint, Handover, Unreachable
from edgekit.assistant.index import Index
from edgekit.assistant.label import Question, is_right, label
from edgekit.assistant.logistic import calibration_error
from edgekit.assistant.privacy import Privacy, Rules
from edgekit.assistant.router import evaluate, fit_router
from edgekit.assistant.search import search
from edgekit.assistant.update import update
from edgekit.cli.knowledge import open_embedder
from edgekit.compress import compress
from edgekit.export.encoder import export_encoder
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.embeddings import Embedder
from edgekit.runtime.session import Session

THREADS = 2
KILLS = 5
PRIVATE = "Oxygen"  # the article whose paragraphs stand for a private folder


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("assistant")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        docs = write_paragraphs(work / "docs")
        tested = questions("testing", 1000)
        embedder = open_embedder(None, threads=THREADS)
        index = measure_index(bench, work, docs, embedder)
        recall = measure_recall(bench, "8 bits", index, tested)
        measure_queries(bench, index, tested)
        full = measure_recall(bench, "float32", float_index(work, docs), tested)
        bench.at_least("hybrid recall@5, 1,000 questions", recall, 0.90)
        bench.at_least("recall@5 of 8-bit embeddings, less that of float32", recall - full, -0.01)
        measure_vectors(bench, work, docs, embedder, tested)
        measure_refusal(bench, work, embedder, tested)
        measure_kills(bench, work, docs)
        measure_privacy(bench, work, embedder)
        measure_router(bench, work, index, 250 if options.quick else 500)
    bench.finish(as_json=options.json)


def measure_index(bench: Benchmark, work: Path, docs: Path, embedder: Embedder) -> Index:
    index = Index.open(work / "int8.db", embedder, create=True)
    changes = update(index, docs)
    assert changes.added == 2067
    bench.value("index 2,067 paragraphs", changes.seconds, "s", note=f"{THREADS} threads, {changes.passages} passages")
    again = update(index, docs)
    bench.value("index again, nothing changed", again.seconds, "s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bench.value("peak memory of the process while indexing", peak / 1e6, "MB", note="the embedder included")
    bench.at_most("index of 2,067 paragraphs, seconds on 2 cores", changes.seconds, 60)
    return index


def float_index(work: Path, docs: Path) -> Index:
    bundle = work / "float32"
    export_encoder(open_model("minilm-l6"), bundle, target=find_target(host_target()))
    index = Index.open(work / "float32.db", Embedder.open(bundle, threads=THREADS), create=True, vectors="float")
    update(index, docs)
    return index


def documents(index: Index, numbers: list[int]) -> list[str]:
    """The first five documents of a list of passages."""
    return list(dict.fromkeys(index.entry(number).document for number in numbers))[:5]


def measure_recall(bench: Benchmark, name: str, index: Index, tested: list[Asked]) -> float:
    """The share of questions whose paragraph is among the first five: of words and vectors alone, and of both."""
    from edgekit.assistant.search import terms

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


def measure_queries(bench: Benchmark, index: Index, tested: list[Asked]) -> None:
    times = [search(index, asked.question).milliseconds for asked in tested]
    bench.samples("query, embedding included", times, unit="ms", note=f"{THREADS} threads")
    slow = float(np.percentile(times, 99))
    bench.value("query, 99th percentile", slow, "ms", n=len(times))
    bench.at_most("query, 99th percentile, ms", slow, 30)


def measure_vectors(bench: Benchmark, work: Path, docs: Path, embedder: Embedder, tested: list[Asked]) -> None:
    """Size, speed and recall of each way to keep vectors: of the vectors' search alone, with the same vectors."""
    remembering = Remembering(embedder)
    for kind in ("float", "int8", "bit"):
        path = work / f"vectors.{kind}.db"
        index = Index.open(path, remembering, create=True, vectors=kind)
        update(index, docs)
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


def measure_refusal(bench: Benchmark, work: Path, embedder: Embedder, tested: list[Asked]) -> None:
    """How often "I don't know" comes, asked of an index that lacks the articles of half of the questions."""
    index = Index.open(work / "half.db", embedder, create=True)
    update(index, write_paragraphs(work / "half", even_only=True))
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


def measure_kills(bench: Benchmark, work: Path, docs: Path) -> None:
    """Kill -9 during indexing: what was stored and is lost, and whether the database is whole."""
    path, chance = work / "killed.db", random.Random(0)
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


def measure_privacy(bench: Benchmark, work: Path, embedder: Embedder) -> None:
    """Private texts against a door that would let everything go; and public questions, which must go."""
    folder = work / "mixed" / "private"
    folder.mkdir(parents=True)
    for row in rows("squad_docs"):
        if row["title"] == PRIVATE:
            (folder / file_name(row["id"])).write_text(row["text"], encoding="utf-8")
    index = Index.open(work / "mixed.db", embedder, create=True)
    update(index, work / "mixed")
    rules = Rules(Privacy(folders=("private",)))
    with recorder() as (url, got):
        door = Handover(Endpoint(url, "larger", seconds=10), work / "log.jsonl", rules)

        def goes(text: str) -> bool:
            if rules.reason([text], index=index):
                return False
            try:
                return bool(door.ask(text, [], [], wrong=None))
            except Unreachable:
                return False

        private = private_texts(random.Random(0))
        assert len(set(private)) == 200
        left = sum(goes(text) for text in private)
        assert left == len(got)
        public = [q.question for q in questions("testing", 300) if not q.file.startswith(PRIVATE)]
        went = sum(goes(text) for text in public)
    bench.value("private texts that left", left, "", n=len(private))
    bench.value("public questions that could leave", went / len(public), "", n=len(public))
    bench.at_most("private texts of 200 that leave", left, 0)
    bench.at_least("share of public questions that may leave", went / len(public), 0.95)


def measure_router(bench: Benchmark, work: Path, index: Index, count: int) -> None:
    """Fit on `count` labelled answers, test on as many about other articles; and what each style gets right."""
    compress(open_model("smollm2-135m"), load_recipe("int4"), work / "small")
    export(open_model(str(work / "small")), work / "small.run", target=find_target(host_target()))
    session = Session.open(work / "small.run", context=2048, threads=THREADS)
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
    right = []
    for asked in questions("testing", count):
        *_, last = assistant.answer(asked.question, max_tokens=64)
        assert isinstance(last, Finished)
        right.append(is_right(last.reply.text, asked.answers))
    return float(np.mean(right))


if __name__ == "__main__":
    main()
