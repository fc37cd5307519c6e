"""Numbers of a run, step by step: one JSON line each in `metrics.jsonl`, and the same to wandb.

    recorder = Recorder("runs/mine", identity="seed 0", config={"lr": 1e-3})
    train(model, batches, loss_fn, config, out_dir="runs/mine", log=recorder.log)
    recorder.finish({"loss": 2.3})

Notebooks have one inside their `Run`; a script under torchrun makes its own, and only its rank 0
writes. Nothing here can stop a run but a full disk: without wandb all is the same but for wandb.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Recorder:
    """Appends rows to `directory/metrics.jsonl` and to a wandb run kept in `directory/wandb`.

    Args:
        wandb_mode: "offline" (files that `wandb sync` uploads), "online" or "disabled".
        identity: what the run computes, such as its settings. A wandb run has the same id as long
            as folder and identity are the same, and so a resumed run goes on where it stopped.
        name, config: title and settings of the run, for wandb's pages.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        wandb_mode: str = "offline",
        identity: str = "",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        if wandb_mode not in ("offline", "online", "disabled"):
            raise ValueError(f"wandb_mode must be offline, online or disabled, got {wandb_mode!r}")
        self.directory = Path(directory).absolute()
        self.path = self.directory / "metrics.jsonl"
        self.wandb_mode, self.name, self.config = wandb_mode, name, plain(config or {})
        # One id for as long as the run computes the same: wandb joins its parts.
        self.run_id = hashlib.sha256(f"{self.directory}:{identity}".encode()).hexdigest()[:16]
        self.writes = int(os.environ.get("RANK", 0)) == 0  # torchrun's number of this process
        self._series: set[frozenset[str]] = set()  # sets of keys that this process has logged
        self._wandb: Any = None  # not started yet; False: does without

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append the numbers of one step.

        Rows with the same keys are a series, with a step count of its own. Its first row here
        drops those from the same step on: a resumed run repeats what followed its checkpoint.
        """
        if not self.writes:
            return
        row, series = {"step": int(step), **plain(metrics)}, frozenset(metrics)
        if series not in self._series:
            self._series.add(series)
            self._begin(series, row["step"])
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._to_wandb(lambda run: run.log(row))

    def history(self) -> list[dict[str, Any]]:
        """All rows so far (a half-written last line of a killed run is left out)."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close the wandb run with these results; `log` begins it anew."""
        if not self.writes:
            return
        self._repeat([row for row in self.history() if _series(row) not in self._series])
        self._to_wandb(lambda run: run.summary.update(plain(summary or {})))
        self._to_wandb(lambda run: run.finish())
        self._wandb, self._series = None, set()

    def _begin(self, series: frozenset[str], step: int) -> None:
        rows = self.history()
        kept = [row for row in rows if _series(row) != series or row["step"] < step]
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)  # a kill leaves the old file or the new one
        self._repeat([row for row in kept if _series(row) == series])

    # ------------------------------------------------------------ wandb

    def _repeat(self, rows: list[dict[str, Any]]) -> None:
        """Give wandb the rows of an earlier process.

        Offline each process writes a file of its own, and the last one uploaded replaces the
        others: so the newest file holds the whole run.
        """
        if self.wandb_mode == "offline":
            for row in rows:
                self._to_wandb(lambda run, row=row: run.log(row))

    def _to_wandb(self, action: Callable[[Any], Any]) -> None:
        if self._wandb is None:
            self._wandb = self._start_wandb()
        if not self._wandb:
            return
        try:
            action(self._wandb)
        except Exception as error:
            warnings.warn(f"wandb stopped ({error}); going on without it", stacklevel=3)
            self._wandb = False

    def _start_wandb(self) -> Any:
        """A wandb run, or False when it is disabled or does not start: no run is lost to it."""
        if self.wandb_mode == "disabled":
            return False
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            given = "WANDB_SERVICE" in os.environ
            import wandb

            self.directory.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project="qwenlib",
                name=self.name,
                id=self.run_id,
                resume="allow" if self.wandb_mode == "online" else None,
                mode=self.wandb_mode,
                dir=str(self.directory),
                config=self.config,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, save_code=False,
                    x_disable_stats=True, x_disable_meta=True,
                ),
            )  # fmt: skip
            if not given:
                # Else processes started here would share this one's service, and it would hold
                # the run of a killed one for ever: its resume could not have the same id.
                os.environ.pop("WANDB_SERVICE", None)
            # Several loops of one notebook may count their own steps.
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:  # a logger must never stop a run
            warnings.warn(f"wandb did not start ({error}); going on without it", stacklevel=4)
            return False


def _series(row: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(row) - {"step"}


def plain(value: Any) -> Any:
    """JSON-ready copy: arrays and tensors of one number become numbers, NaN and infinity null.

    Raises TypeError for anything that is not a number, text, path, list or dict.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result must be a number, text, list or dict, got {type(value).__name__}")
