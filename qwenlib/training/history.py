"""What a run measured, step by step: in memory, and as lines of JSON beside its states."""

import json
import os
import warnings
from pathlib import Path


class History:
    """rows: one dict a step; evaluations: one dict each. Both have the key step.

    With a file each is appended as a line when it is made (evaluations as {"evaluation": …}): a
    state on disk need not hold them, and saving one costs the same after a million steps as after
    ten. A run that goes on at a state of `step` keeps the lines up to it and cuts what came later;
    a file that lacks some of them is told of, and the run goes on. With step 0 the file begins
    anew. write=False reads and leaves the file alone (ranks other than the first).
    """

    def __init__(self, file: Path | None = None, step: int = 0, write: bool = True):
        self.rows: list[dict] = []
        self.evaluations: list[dict] = []
        self.file, self.write = file, write
        if file is None:
            return
        if step:
            self._read(step)
        if write:
            self._begin()

    def add(self, row: dict) -> None:
        """A step's row."""
        self.rows.append(row)
        self._append(row)

    def add_evaluation(self, row: dict) -> None:
        """An evaluation's row."""
        self.evaluations.append(row)
        self._append({"evaluation": row})

    def sync(self) -> None:
        """Return when all lines are on the disk: before a state says that the run got there."""
        if self.file and self.write:
            with self.file.open("a") as file:
                os.fsync(file.fileno())

    def _append(self, line: dict) -> None:
        if self.file and self.write:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_text(line))

    def _read(self, step: int) -> None:
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # half a line: the run was killed while it wrote
            rows = self.evaluations if "evaluation" in row else self.rows
            row = row.get("evaluation", row)
            if row["step"] <= step:
                rows.append(row)
        if [row["step"] for row in self.rows] != list(range(1, step + 1)):
            warnings.warn(
                f"{self.file} has {len(self.rows)} of the {step} steps so far; the run goes on, "
                "its curves have a gap",
                stacklevel=4,
            )

    def _begin(self) -> None:
        """The file with what is in memory, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        lines = [*self.rows, *({"evaluation": row} for row in self.evaluations)]
        partial.write_text("".join(map(_text, lines)), encoding="utf-8")
        os.replace(partial, self.file)


def _text(line: dict) -> str:
    return json.dumps(line, default=float) + "\n"  # default: numbers of NumPy and PyTorch
