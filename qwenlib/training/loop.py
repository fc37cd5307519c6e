"""The training loop that pretraining, context extension, SFT, DPO and GRPO share.

Batches are a function of the step alone, losses return (sum, count), and the state on disk holds
the rest: a run that was interrupted and resumed equals the straight run bit for bit.
"""

import dataclasses
import difflib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qwenlib.machine import fast_bfloat16
from qwenlib.training.gradients import Gradients
from qwenlib.training.optim import adamw
from qwenlib.training.resume import load_state, save_state
from qwenlib.training.schedule import SCHEDULES, learning_rate_at


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser settings of one run. Steps are optimiser steps; shares are of max_steps."""

    max_steps: int
    learning_rate: float
    min_lr_ratio: float = 0.1
    warmup_share: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0
    eval_every: int = 0  # 0: only at the end
    save_every: int = 0  # 0: no resume state
    autocast: str = "none"  # none | bfloat16 over fp32 weights | auto: bf16 where it is fast
    workers: int = 0  # micro-batches at once on a CPU (see `Gradients`); 0: as many as threads

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.schedule not in SCHEDULES:
            near = difflib.get_close_matches(self.schedule, SCHEDULES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown schedule {self.schedule!r}{hint}")
        if self.autocast not in ("none", "bfloat16", "auto"):
            raise ValueError(
                f"autocast must be 'none', 'bfloat16' or 'auto', got {self.autocast!r}"
            )

    def resolved(self, device: torch.device) -> "TrainConfig":
        """These settings with autocast "auto" decided for the device."""
        return dataclasses.replace(self, autocast=compute_dtype(self.autocast, device))


def compute_dtype(autocast: str, device: torch.device) -> str:
    """The setting `autocast` with "auto" decided: "bfloat16" where its products are fast."""
    if autocast != "auto":
        return autocast
    return "bfloat16" if fast_bfloat16(device) else "none"


@dataclass
class TrainResult:
    """history: one dict a step (step, loss, lr, grad_norm, tokens, …); evaluations likewise."""

    model: nn.Module
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Labels trained on so far."""
        return int(sum(row["count"] for row in self.history))


def train(
    model: nn.Module,
    batches: Callable[[int], list],
    loss_fn: Callable[[nn.Module, Any], tuple],
    config: TrainConfig,
    *,
    out_dir: str | Path | None = None,
    log: Callable[[dict, int], None] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    description: str = "train",
    show_progress: bool = True,
) -> TrainResult:
    """Run `config.max_steps` optimiser steps, from the resume state in `out_dir` if there is one.

    Args:
        batches: step -> micro-batches of that step; a pure function, which makes resuming exact.
        loss_fn: (model, micro-batch) -> (loss_sum, count, stats). The step's gradient is that of
            the sum of loss_sum over the sum of counts. stats are means; the step's are weighted
            by the counts.
        log: called as log({"loss": …}, step) after every step.
        evaluate: model -> metrics, before the first step, every `eval_every` steps and at the end.
        optimizer: in place of AdamW; its groups' learning rate follows the schedule.
    Raises FloatingPointError when loss or gradient is not finite, naming the step.
    """
    optimizer = optimizer or adamw(
        model, config.learning_rate, config.betas, config.eps, config.weight_decay
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    config = config.resolved(parameters[0].device)
    result = TrainResult(model, config.max_steps)
    state_dir = Path(out_dir) / "state" if out_dir and config.save_every else None
    first = 0
    if state_dir and (restored := load_state(state_dir, model, optimizer)):
        first, extra = restored
        _check_same(config, extra["config"], state_dir)
        result.history, result.evaluations = extra["history"], extra["evaluations"]
        result.seconds = extra["seconds"]
    started = time.perf_counter() - result.seconds
    if evaluate and not result.evaluations:
        result.evaluations.append({"step": 0, **evaluate(model)})
    bar = tqdm(
        range(first, config.max_steps), initial=first, total=config.max_steps, desc=description,
        mininterval=2.0, file=sys.stdout, ascii=True, ncols=78,
        disable=not show_progress,
    )  # fmt: skip
    with Gradients(parameters, config.autocast, config.workers) as gradients:
        for step in bar:
            model.train()
            lr = learning_rate_at(
                step, config.max_steps, config.learning_rate,
                max(1, round(config.warmup_share * config.max_steps)), config.schedule,
                config.min_lr_ratio,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            row = _step(model, batches(step), loss_fn, optimizer, gradients, config, step)
            row |= {"step": step + 1, "lr": lr, "seconds": time.perf_counter() - started}
            result.history.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            if log:
                log({key: value for key, value in row.items() if key != "step"}, step + 1)
            last = step + 1 == config.max_steps
            if evaluate and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                scores = evaluate(model)
                result.evaluations.append({"step": step + 1, **scores})
                if log:
                    log({f"eval/{key}": value for key, value in scores.items()}, step + 1)
            if state_dir and not last and (step + 1) % config.save_every == 0:
                extra = {
                    "history": result.history,
                    "evaluations": result.evaluations,
                    "seconds": time.perf_counter() - started,
                    "config": dataclasses.asdict(config),
                }
                save_state(state_dir, step + 1, model, optimizer, extra)
    result.seconds = time.perf_counter() - started
    model.eval()
    return result


def clear_state(out_dir: str | Path) -> None:
    """Drop the resume state, once the stage has written its result."""
    shutil.rmtree(Path(out_dir) / "state", ignore_errors=True)


def _step(model, micro_batches, loss_fn, optimizer, gradients, config, step) -> dict[str, float]:
    """One optimiser step; the denominator is the count over all micro-batches."""
    parameters = gradients.parameters
    total, count, sums = gradients(model, micro_batches, loss_fn)
    if count > 0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(count)
    norm = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf")))
    loss = total / max(count, 1)
    if not (abs(loss) < float("inf") and norm < float("inf")):
        raise FloatingPointError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; lower learning_rate or look at "
            "the batch of this step"
        )
    if count > 0:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {key: value / max(count, 1) for key, value in sums.items()}
    return {"loss": loss, "grad_norm": norm, "count": count, **means}


def _check_same(config: TrainConfig, saved: dict, state_dir: Path) -> None:
    now = dataclasses.asdict(config)
    now.pop("workers")  # changes the time and, as threads do, the rounding
    changed = sorted(key for key in now if now[key] != saved.get(key))
    if changed:
        raise ValueError(
            f"{state_dir} was written with other settings of {', '.join(changed)}; "
            "remove the folder to start afresh"
        )
