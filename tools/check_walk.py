"""Exit 1 unless a run folder holds every chapter, done, with all its checks passed.

python tools/check_walk.py runs/walkthrough
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(run_dir: Path, chapters: list[str]) -> list[str]:
    """What is missing or failed in `run_dir`, one line each."""
    found = [] if (run_dir / "index.html").is_file() else [f"{run_dir}/index.html is missing"]
    for chapter in chapters:
        stage = run_dir / chapter
        found += [
            f"{chapter}: no {name}"
            for name in ("notebook.ipynb", "results.json")
            if not (stage / name).is_file()
        ]
        if not (stage / "results.json").is_file():
            continue
        results = json.loads((stage / "results.json").read_text())
        if results["status"] != "done":
            found.append(f"{chapter}: {results['status']}: {results.get('error', '')}")
        found += [
            f"{chapter}: check {check['name']!r} failed: {check['text']}"
            for check in results["checks"]
            if not check["passed"]
        ]
    return found


def main() -> int:
    run_dir = Path(sys.argv[1])
    chapters = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    found = problems(run_dir, chapters) if chapters else ["there is no notebook"]
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        print(f"{len(chapters)} chapters done in {run_dir}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
