"""Reading documents: encodings, headings, HTML, and files that want to do harm."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import pytest

from edgekit.assistant.documents import Document, File, Heading, Limits, Skipped, load, read, walk
from edgekit.errors import UserError


def headings(text: str, kind: str = "markdown") -> list[tuple[int, str]]:
    document = read(File("a.md", kind), text.encode())  # type: ignore[arg-type]
    assert isinstance(document, Document)
    for heading in document.headings:
        assert heading.title in document.text[heading.start : heading.end]
    return [(heading.level, heading.title) for heading in document.headings]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A\ntext\n## B ##\n", [(1, "A"), (2, "B")]),
        ("#no\n####### seven\n    # code\n", []),
        ("```\n# no\n```\n# yes\n", [(1, "yes")]),
        ("~~~~\n```\n# no\n~~~\n# no\n~~~~\n# yes\n", [(1, "yes")]),
        ("Title\n=====\n\nPart\n---\nx\n", [(1, "Title"), (2, "Part")]),
        ("text\n\n---\nmore\n", []),
        ("---\ntitle: x\n# no\n---\n# yes\n", [(1, "yes")]),
        ("#\n", [(1, "")]),
    ],
)
def test_markdown_headings(text: str, expected: list[tuple[int, str]]) -> None:
    if expected == [(1, "")]:
        text += "x\n"
    assert headings(text) == expected


def test_html_keeps_what_is_read_and_nothing_else() -> None:
    page = (
        "<title>T</title><style>p{}</style><h1>One</h1><p>a <b>b</b>c<br>d&amp;e</p><script>steal()</script>"
        "<template>t</template><nav>menu</nav><ul><li>x<li>y</ul><h2>Two</h2>end"
    )
    document = read(File("p.html", "html"), page.encode())
    assert isinstance(document, Document)
    assert document.title == "One"
    assert document.text.split("\n\n") == ["One", "a bc", "d&e", "x", "y", "Two", "end", ""]
    assert document.headings == (Heading(0, 3, 1, "One"), Heading(22, 25, 2, "Two"))


def test_an_unclosed_head_does_not_swallow_the_page() -> None:
    document = read(File("p.html", "html"), b"<head><style>x</style><body><p>text</p>")
    assert isinstance(document, Document)
    assert document.text == "text\n\n"


@pytest.mark.parametrize("unit", ["<a ", "<!--", "</", "<a b='", "<div>", "<script>", "&#", "<![CDATA[", "a<b "])
def test_html_takes_linear_time(unit: str) -> None:
    """A quadratic reader would need hours for one of these."""
    page = unit * 300_000 + "<p>end"
    document = read(File("p.html", "html"), page.encode())
    assert isinstance(document, Document | Skipped)


def test_attributes_and_broken_tags() -> None:
    page = """<p title="a > b" class='x'>one</p><p>2 < 3 and 4 > 1</p><a href="x>two</a><p>three<title>&lt;T</title>"""
    document = read(File("p.html", "html"), page.encode())
    assert isinstance(document, Document)
    assert document.title == "<T"
    assert document.text.split("\n\n") == ["one", "2 < 3 and 4 > 1", "two", "three", ""]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("grün\r\nx\ry".encode(), "grün\nx\ny"),
        (b"\xef\xbb\xbfa", "a"),
        ("grün".encode("utf-16"), "grün"),
        ("grün".encode("cp1252"), "grün"),
    ],
)
def test_encodings(data: bytes, text: str) -> None:
    assert read(File("a.txt", "text"), data) == Document("a", text)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"a\0b", "not text"), (b" \n ", "no text in it"), (b"x" * 101, "more than 100 characters")],
)
def test_what_is_no_text_is_left_out(data: bytes, reason: str) -> None:
    found = read(File("a.txt", "text"), data, Limits(characters=100))
    assert isinstance(found, Skipped)
    assert reason in found.reason


def test_walking_follows_no_links_and_opens_no_devices(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    docs = tmp_path / "docs"
    (docs / "inner").mkdir(parents=True)
    (docs / "b.txt").write_text("b")
    (docs / "inner" / "a.MD").write_text("a")
    (docs / ".hidden.md").write_text("x")
    (docs / "photo.png").write_text("x")
    (docs / "link.txt").symlink_to(secret)
    (docs / "folder").symlink_to(tmp_path)
    (docs / "loop").symlink_to(docs)
    os.mkfifo(docs / "pipe.txt")
    os.mkfifo(docs / "pipe")
    found = list(walk(docs))
    assert [item for item in found if isinstance(item, File)] == [File("b.txt", "text"), File("inner/a.MD", "markdown")]
    assert {item.path for item in found if isinstance(item, Skipped)} == {"link.txt", "folder", "loop", "pipe.txt"}
    # a link or a pipe that comes after the walk
    for name in ("link.txt", "pipe.txt"):
        assert isinstance(load(docs, File(name, "text")), Skipped)
    assert load(docs, File("b.txt", "text")) == b"b"
    assert load(docs, File("b.txt", "text"), Limits(file_bytes=0)) == Skipped("b.txt", "more than 0 MB")


def test_a_name_that_is_no_text_and_a_deep_folder(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    deep = tmp_path
    for _ in range(45):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("x")
    reasons = [item.reason for item in walk(tmp_path) if isinstance(item, Skipped)]
    assert reasons == ["more than 40 folders deep", "its name is not UTF-8"]


def test_no_folder() -> None:
    with pytest.raises(UserError, match="must be a folder that can be read"):
        list(walk(Path("/nowhere/at/all")))


# --- PDF --------------------------------------------------------------------------------------------------------------


def pdf(contents: list[bytes], *, filters: str = "", kids: int | None = None) -> bytes:
    """A PDF with a page for each content stream."""
    count = len(contents)
    pages = " ".join(f"{4 + 2 * at} 0 R" for at in range(count) for _ in range(kids or 1))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{pages}]/Count {count * (kids or 1)}>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for at, content in enumerate(contents):
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>"
            + f"/Contents {5 + 2 * at} 0 R>>".encode()
        )
        objects.append(f"<</Length {len(content)}{filters}>>stream\n".encode() + content + b"\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(objects) + 1}/Root 1 0 R>>"
    return out + trailer.encode() + f"\nstartxref\n{len(out)}\n%%EOF".encode()


def words(text: str) -> bytes:
    return f"BT /F 12 Tf 50 700 Td ({text}) Tj ET".encode()


PDF = File("manual.pdf", "pdf")


def test_pdf_pages_become_headings() -> None:
    document = read(PDF, pdf([words("first page"), b"", words("third page")]))
    assert isinstance(document, Document)
    assert document.title == "manual"
    assert [heading.title for heading in document.headings] == ["page 1", "page 3"]
    assert "first page" in document.text[: document.headings[1].start]
    assert document.text[document.headings[1].start :].strip() == "third page"


def bomb() -> bytes:
    """300 kB that become 30 GB: a stream of zeros, compressed three times."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(b" " * 10_000_000) for _ in range(30)) + packer.flush()
    for _ in range(2):
        data = zlib.compress(data, 9)
    return pdf([data], filters="/Filter[/FlateDecode/FlateDecode/FlateDecode]")


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (b"%PDF-1.4 broken", Limits(), "broken or needs a password"),
        (b"", Limits(), "broken"),
        (pdf([words("x")], kids=30), Limits(pages=20), "more than 20 pages"),
        (bomb(), Limits(), "no text in it|more memory|broken|time or memory"),
        (pdf([words("x")]), Limits(seconds=0.01), "longer than 0.01 s"),
        (pdf([words("x")]), Limits(memory_bytes=20_000_000), "memory|broken"),
    ],
    ids=["broken", "empty", "pages", "bomb", "slow", "memory"],
)
def test_a_pdf_that_does_harm_is_left_out(data: bytes, limits: Limits, reason: str) -> None:
    found = read(PDF, data, limits)
    assert isinstance(found, Skipped)
    assert re.search(reason, found.reason), found.reason


def test_a_module_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pypdf.py").write_text("open('run', 'w')")
    (tmp_path / "json.py").write_text("open('run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert isinstance(read(PDF, pdf([words("page")])), Document)
    assert not (tmp_path / "run").exists()
