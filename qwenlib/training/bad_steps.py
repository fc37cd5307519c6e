"""Steps whose gradient must not reach the weights: not finite, or far above the recent ones."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from qwenlib.training.distributed import rank, world_size

RECENT, ENOUGH = 100, 20  # rows that a median is taken of, and how many it needs
MOST_IN_A_ROW = 10  # so many bad steps may be skipped one after the other


def why_bad(loss: float, norm: float, history: Sequence[dict], spike_factor: float) -> str | None:
    """Why a step with this loss (nats) and gradient norm is bad; None for a good one.

    With a spike_factor, loss and norm must not exceed that many times their median over the last
    100 steps (skipped ones and those without labels left out; below 20 of them anything goes). A
    median that is not positive, as that of some RL losses, is no measure and is passed over.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss}, gradient norm {norm}"
    rows = [row for row in history[-RECENT:] if row["count"] and not row.get("skipped")]
    if not spike_factor or len(rows) < ENOUGH:
        return None
    for name, key, value in (("loss", "loss", loss), ("gradient norm", "grad_norm", norm)):
        median = statistics.median(row[key] for row in rows)
        if value > spike_factor * median > 0:
            return (
                f"{name} {value:.4g} is above {spike_factor:g} times {median:.4g}, the median of "
                f"{len(rows)} recent steps"
            )
    return None


def too_many(history: Sequence[dict]) -> bool:
    """Whether the last MOST_IN_A_ROW steps were all skipped: then it is not the data."""
    skipped = takewhile(lambda row: row.get("skipped"), reversed(history))
    return len(list(skipped)) >= MOST_IN_A_ROW


def name_batch(
    step: int, reason: str, loss: float, micro_batches: Sequence[Any], losses: Sequence[float],
    out_dir: str | Path | None,
) -> str:  # fmt: skip
    """Which micro-batches of a bad step (counted from 1) are to blame, as words.

    losses: mean loss of each, loss: of the step. When that is not finite, those that are not finite
    are to blame (in a group of processes perhaps none of ours); else, all of them. A micro-batch
    with a method `describe` says which rows it holds. With an out_dir its ids and labels are
    written to out_dir/bad_steps/step_N.json.
    """
    blamed = [i for i, one in enumerate(losses) if math.isfinite(loss) or not math.isfinite(one)]
    ours = f" of rank {rank()}" if world_size() > 1 else ""
    if not blamed:
        return f"no micro-batch{ours} is to blame"
    words = []
    for i in blamed:
        says = getattr(micro_batches[i], "describe", None)
        rows = f" ({says()})" if says else ""
        number = f"micro-batch {i + 1} of {len(micro_batches)}{ours}"
        words.append(f"{number}{rows}: loss {losses[i]:.4g}")
    where = ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
    if out_dir is None:
        return where
    file = Path(out_dir) / "bad_steps" / f"step_{step:08d}{ours.replace(' ', '_')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        {"micro_batch": i + 1, "loss": losses[i], "batch": _plain(micro_batches[i])} for i in blamed
    ]
    text = json.dumps({"step": step, "reason": reason, "micro_batches": parts})
    file.write_text(text + "\n", encoding="utf-8")
    return f"{where}; see {file}"


def _plain(value: Any) -> Any:
    """Tensors and dataclasses as lists and dicts, for JSON; anything else as its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)
