"""The report of a run folder: one self-contained page, and each notebook as HTML."""
from __future__ import annotations
from pathlib import Path
from collections.abc import Mapping
from qwenlib import stages
def write(run_dir: Path, graph) -> Path:
    return run_dir / "index.html"
def update(run_dir, graph, name): pass
