"""Public tables of training runs, fetched when needed and never shipped with this package.

Each loader takes a local path (a file, or a folder that holds it); without one,
`qwenlib.assets.fetch` finds or downloads the table and checks its hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenlib import assets

STEP_LAW_SEQ_LEN = 2048  # its `bs` column counts sequences of this length


@dataclass(frozen=True)
class ChinchillaRuns:
    """Points read off figure 4 of arXiv 2203.15556 by Epoch (arXiv 2404.10102), shapes (runs,)."""

    N: np.ndarray  # parameters
    D: np.ndarray  # tokens, C / 6N
    C: np.ndarray  # training FLOPs
    loss: np.ndarray  # nats per token

    def without_worst(self, count: int = 5) -> ChinchillaRuns:
        """Drop the `count` runs of highest loss: the excluded outliers of arXiv 2404.10102."""
        keep = np.sort(np.argsort(self.loss, kind="stable")[: len(self.loss) - count])
        return ChinchillaRuns(self.N[keep], self.D[keep], self.C[keep], self.loss[keep])


@dataclass(frozen=True)
class StepLawRuns:
    """Learning-rate and batch-size grids of arXiv 2503.04715, dense models, shapes (runs,)."""

    N: np.ndarray  # parameters without embeddings
    D: np.ndarray  # tokens
    learning_rate: np.ndarray  # peak
    batch_tokens: np.ndarray
    loss: np.ndarray  # smoothed training loss, nats per token
    cell: np.ndarray  # index of the (N, D) pair


def find_table(name: str, path: str | Path | None = None) -> Path:
    """Path of one public table; AssetError when it is neither here nor to be had."""
    if path is not None and Path(path).is_dir():
        path = Path(path) / assets.get(name).shared_name
    return assets.fetch(name, path)


def chinchilla_runs(path: str | Path | None = None) -> ChinchillaRuns:
    """The 245 extracted runs. Raises ValueError when the table lacks a column."""
    table = _read(find_table("chinchilla-runs", path), ["Model Size", "Training FLOP", "loss"])
    N, C, loss = (table[k].to_numpy(float) for k in ("Model Size", "Training FLOP", "loss"))
    return ChinchillaRuns(N=N, D=C / (6 * N), C=C, loss=loss)


def steplaw_dense_runs(path: str | Path | None = None) -> StepLawRuns:
    """The 1,911 dense runs over 17 (N, D) cells. Raises ValueError when a column is missing."""
    columns = ["N", "D", "lr", "bs", "smooth loss"]
    table = _read(find_table("steplaw-dense-runs", path), columns)
    N, D, rate, batch, loss = (table[k].to_numpy(float) for k in columns)
    _, cell = np.unique(np.stack([N, D], 1), axis=0, return_inverse=True)
    return StepLawRuns(N, D, rate, batch * STEP_LAW_SEQ_LEN, loss, cell.ravel())


def _read(path: Path, columns: list[str]):
    import pandas as pd

    table = pd.read_csv(path)
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise ValueError(f"{path}: columns {missing} missing; is this the right table?")
    return table.dropna(subset=columns)
