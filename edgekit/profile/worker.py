"""The far end of `edgekit.profile.remote`: measures a bundle, and tells how by one JSON object a line.

    python -m edgekit.profile.worker BUNDLE        options as JSON on stdin

{"step": [done, in all]} as it goes on, at the end {"report": "..."}, or {"error": "...", "exit": 2}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    from edgekit.errors import EdgekitError
    from edgekit.profile.options import Options
    from edgekit.profile.run import profile

    def tell(**line: object) -> None:
        print(json.dumps(line), flush=True)

    try:
        options = Options.from_json(sys.stdin.read())
        report = profile(Path(sys.argv[1]), options, on_step=lambda done, total: tell(step=[done, total]))
    except EdgekitError as problem:
        tell(error=str(problem), exit=problem.exit_code)
        return problem.exit_code
    tell(report=report.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
