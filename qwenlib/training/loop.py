"""The training loop that pretraining, context extension, SFT, DPO and GRPO share.

Batches are a function of the step alone, losses return (sum, count), and the state on disk holds
the rest: a run that was interrupted and resumed equals the straight run bit for bit.
"""

import dataclasses
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from qwenlib.training.averages import WeightAverage
from qwenlib.training.bad_steps import name_batch, too_many, why_bad
from qwenlib.training.compute import checkpointed, compiled, uncompiled
from qwenlib.training.config import TrainConfig, compute_dtype
from qwenlib.training.distributed import rank, sum_gradients, sum_over_ranks, world_size
from qwenlib.training.gradients import Gradients
from qwenlib.training.history import History
from qwenlib.training.meter import Meter, bits_a_byte, progress
from qwenlib.training.optim import adamw
from qwenlib.training.preemption import Preemption
from qwenlib.training.resume import load_state, save_state
from qwenlib.training.schedule import learning_rate_at
from qwenlib.training.sharding import is_sharded, let_go

__all__ = ["TrainConfig", "TrainResult", "clear_state", "compute_dtype", "train"]


@dataclass
class TrainResult:
    """history: one dict a step (step, loss, grad_norm, lr, count, …); evaluations likewise."""

    model: nn.Module
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    average: WeightAverage | None = None  # with ema_decay; `average.copy_to(model)` takes it over

    @property
    def tokens(self) -> int:
        """Labels trained on so far."""
        return int(sum(row["count"] for row in self.history if not row.get("skipped")))


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
            One with a `row_shape` (rows, tokens a row) is counted for the speed (see `Meter`), one
            with a method `describe` says what it holds when the step is bad.
        loss_fn: (model, micro-batch) -> (loss_sum, count, stats). The step's gradient is that of
            the sum of loss_sum over the sum of counts. stats are means; the step's are weighted
            by the counts.
        log: called as log({"loss": …}, step) after every step.
        evaluate: model -> metrics, before the first step, every `eval_every` steps and at the end;
            with ema_decay the model has the averaged weights in it.
        optimizer: in place of AdamW; its groups' learning rate follows the schedule.
    Raises FloatingPointError for a bad step, naming it and its micro-batches; the weights are those
    before it, and the last state stays. A bad step that is skipped leaves the optimiser alone.
    Raises ValueError for resume states of a model that several processes share out, and
    Preempted after the step in which SIGTERM or SIGUSR1 came, with the state of it saved.
    """
    let_go(model)
    optimizer = optimizer or adamw(
        model, config.learning_rate, config.betas, config.eps, config.weight_decay
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    config = config.resolved(parameters[0].device)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    result = TrainResult(model, config.max_steps, average=average)
    state_dir = Path(out_dir) / "state" if out_dir and config.save_every else None
    if state_dir and world_size() > 1 and is_sharded(model):
        raise ValueError("the parts of a sharded model cannot be saved yet; set save_every to 0")
    first = 0
    check, weights = partial(_check_same, config, state_dir), average and average.weights
    if state_dir and (restored := load_state(state_dir, model, optimizer, weights, check)):
        first, extra = restored
        result.seconds = extra["seconds"]
        if average:
            average.updates = extra["average_updates"]
    history = History(state_dir and state_dir / "history.jsonl", first, write=rank() == 0)
    result.history, result.evaluations = history.rows, history.evaluations
    meter = Meter(model, parameters[0].device, config.autocast)
    started = time.perf_counter() - result.seconds
    if evaluate and not first:
        history.add_evaluation({"step": 0, **_evaluated(evaluate, model, average)})
    bar = tqdm(
        range(first, config.max_steps), initial=first, total=config.max_steps, desc=description,
        mininterval=2.0, file=sys.stdout, ascii=True, ncols=88,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        disable=not show_progress or rank() > 0,
    )  # fmt: skip
    workers = 1 if config.compile else config.workers  # threads would compile at the same time
    with (
        compiled(model, config.compile),
        checkpointed(model, config.activation_checkpointing),
        Gradients(parameters, config.autocast, workers) as gradients,
        Preemption(parameters[0].device) as preemption,
    ):
        for step in bar:
            model.train()
            lr = learning_rate_at(
                step, config.max_steps, config.learning_rate,
                max(1, round(config.warmup_share * config.max_steps)), config.schedule,
                config.min_lr_ratio, config.decay_share,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            meter.start()
            with uncompiled(config.compile):  # a batch may be sampled from the model
                micro_batches = batches(step)
            row, bad = _step(
                model, micro_batches, loss_fn, optimizer, gradients, meter, config, history.rows
            )
            if bad:
                where = name_batch(
                    step + 1, bad, row["loss"], micro_batches, gradients.losses, out_dir
                )
                text = f"step {step + 1}: {bad}; {where}"
                if config.on_bad_step == "stop" or too_many(result.history):
                    raise FloatingPointError(f"{text}; lower learning_rate or look at the batch")
                warnings.warn(f"skipped {text}", stacklevel=2)
            elif average:
                average.update(model)
            row |= {"step": step + 1, "lr": lr, "seconds": time.perf_counter() - started}
            history.add(row)
            bar.set_postfix_str(progress(row), refresh=False)
            if log:
                log({key: value for key, value in row.items() if key != "step"}, step + 1)
            last = step + 1 == config.max_steps
            if evaluate and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                with uncompiled(config.compile):
                    scores = _evaluated(evaluate, model, average)
                history.add_evaluation({"step": step + 1, **scores})
                if log:
                    log({f"eval/{key}": value for key, value in scores.items()}, step + 1)
            leaving = preemption.requested()
            due = not last and state_dir and (step + 1) % config.save_every == 0
            if due or (leaving and state_dir):
                extra = {
                    "seconds": time.perf_counter() - started,
                    "config": dataclasses.asdict(config),
                    "average_updates": average.updates if average else 0,
                }
                history.sync()
                kept = config.keep_every * config.save_every
                save_state(state_dir, step + 1, model, optimizer, extra, weights, kept)
            if leaving:
                preemption.leave(step + 1, bool(state_dir))
    result.seconds = time.perf_counter() - started
    model.eval()
    return result


def clear_state(out_dir: str | Path) -> None:
    """Drop the resume state, once the stage has written its result."""
    shutil.rmtree(Path(out_dir) / "state", ignore_errors=True)


def _evaluated(evaluate, model, average: WeightAverage | None) -> dict:
    with average.in_place_of(model) if average else nullcontext():
        scores = evaluate(model)
        let_go(model)
        return scores


def _step(model, micro_batches, loss_fn, optimizer, gradients, meter, config, history) -> tuple:
    """One optimiser step, or why there was none; it divides by the count over all micro-batches."""
    parameters = gradients.parameters
    total, count, sums = gradients(model, micro_batches, loss_fn)
    numbers = sum_over_ranks(
        [total, count, *meter.work(gradients.shapes), *sums.values()], gradients.device
    )
    total, count, tokens, flops = numbers[:4]
    sum_gradients(parameters)
    if count > 0:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], count)
    norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    loss = total / max(count, 1)
    bad = why_bad(loss, norm, history, config.spike_factor)
    if count > 0 and not bad:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {key: value / max(count, 1) for key, value in zip(sums, numbers[4:], strict=True)}
    row = {"loss": loss, "grad_norm": norm, "count": count, "skipped": float(bool(bad))}
    return row | bits_a_byte(means) | meter.read(tokens, flops), bad


def _check_same(config: TrainConfig, state_dir: Path, extra: dict) -> None:
    if changed := config.differences(extra["config"]):
        raise ValueError(
            f"{state_dir} was written with other settings of {', '.join(changed)}; "
            "remove the folder to start afresh"
        )
