"""Put the outputs of a finished run into notebooks/, or check that they are those of the source.

    python tools/refresh_notebooks.py runs/walkthrough   # copy the executed notebooks back
    python tools/refresh_notebooks.py --check            # exit 1 when a notebook's code is newer

A refreshed notebook remembers the hash of its code and parameters in its metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 400_000


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of every cell's source, Markdown left out: prose may change without a new run."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def cleaned(executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as an author saves it: no injected cell, no traces of the runner or machine."""
    cells = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    executed.cells = cells
    kept = ("kernelspec", "language_info")
    executed.metadata = nbformat.from_dict(
        {key: executed.metadata[key] for key in kept if key in executed.metadata}
    )
    executed.metadata["qwenlib"] = {"executed_source_sha256": code_hash(executed)}
    # Outputs name files below the repository; where it lies on this machine says nothing.
    return nbformat.reads(nbformat.writes(executed).replace(f"{ROOT}/", ""), as_version=4)


def refresh(run_dir: Path, notebooks_dir: Path) -> list[str]:
    """Copy every chapter of `run_dir` back; returns what was wrong (nothing is half copied)."""
    problems, ready = [], {}
    for target in sorted(notebooks_dir.glob("[0-9]*.ipynb")):
        stage = run_dir / target.stem
        if not (stage / "notebook.ipynb").is_file():
            problems.append(f"{target.stem}: not in {run_dir}; run `make walkthrough` first")
            continue
        results = json.loads((stage / "results.json").read_text())
        if results["status"] != "done" or results["profile"] != "tiny":
            problems.append(
                f"{target.stem}: the run is {results['status']} under {results['profile']}"
            )
            continue
        source = nbformat.read(target, as_version=4)
        executed = cleaned(nbformat.read(stage / "notebook.ipynb", as_version=4))
        if code_hash(executed) != code_hash(source):
            problems.append(f"{target.stem}: its code has changed since {run_dir} was run")
            continue
        # Prose comes from the source: it may be newer than the run.
        outputs = iter([c for c in executed.cells if c.cell_type == "code"])
        for cell in source.cells:
            if cell.cell_type == "code":
                done = next(outputs)
                cell.outputs, cell.execution_count = done.outputs, done.execution_count
        source.metadata = executed.metadata
        text = nbformat.writes(source) + "\n"
        if len(text.encode()) > LARGEST_BYTES:
            size = len(text.encode()) // 1000
            problems.append(f"{target.stem}: {size} KB with outputs, over {LARGEST_BYTES // 1000}")
            continue
        ready[target] = text
    if not problems:
        for target, text in ready.items():
            target.write_text(text, encoding="utf-8")
    return problems


def check(notebooks_dir: Path) -> list[str]:
    """Notebooks whose committed outputs are not those of their code, or that are too large."""
    problems = []
    for path in sorted(notebooks_dir.glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        recorded = notebook.metadata.get("qwenlib", {}).get("executed_source_sha256")
        if recorded is None:
            problems.append(f"{path.name}: has no outputs of a run; run `make notebooks`")
        elif recorded != code_hash(notebook):
            problems.append(f"{path.name}: its code is newer than its outputs; `make notebooks`")
        if path.stat().st_size > LARGEST_BYTES:
            problems.append(f"{path.name}: over {LARGEST_BYTES // 1000} KB")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", nargs="?", type=Path, help="a finished run under profile tiny")
    parser.add_argument("--check", action="store_true", help="only check, change nothing")
    arguments = parser.parse_args()
    if arguments.check == (arguments.run_dir is not None):
        parser.error("give either a run folder or --check")
    folder = ROOT / "notebooks"
    problems = check(folder) if arguments.check else refresh(arguments.run_dir, folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
