"""Write the handbook of a US agency (18F, public domain) as a folder of Markdown files, for the worked example.

    python examples/assistant/handbook.py handbook_docs.jsonl.gz handbook

The first argument holds a JSON object {"id", "title", "text"} a line, compressed by gzip.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from edgekit.folder import inside


def main(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            page = json.loads(line)
            path = inside(folder, f"{page['id']}.md")  # the names come from a file: they stay below the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {page['title']}\n\n{page['text']}\n", encoding="utf-8")
            count += 1
    print(f"{folder}: {count} documents")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
