"""Resume state: model, optimiser, step and random generators, written whole or not at all."""

import contextlib
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn


def _random_state() -> dict:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state()}
    state["python"] = random.getstate()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict,
    average: dict[str, torch.Tensor] | None = None, keep_multiples_of: int = 0,
) -> None:  # fmt: skip
    """Write `directory/step_N` beside its predecessors, then drop the older ones.

    average: averaged weights by name, where a run has them. States whose step is a multiple of
    keep_multiples_of stay for good.
    """
    final = directory / f"step_{step:08d}"
    partial = directory / f".partial_{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {"model": model.state_dict()}
    if optimizer.state:  # none before the first step that has a label
        state["optimizer"] = _flatten(optimizer.state_dict())
    if average:
        state["average"] = average
    with _quiet():
        dcp.save(state, checkpoint_id=partial / "tensors", no_dist=True)
    meta = {
        "step": step,
        "stepped": bool(optimizer.state),
        "groups": optimizer.state_dict()["param_groups"],
        "random": _random_state(),
        "extra": extra,
    }
    torch.save(meta, partial / "meta.pt")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in sorted(directory.glob("step_*"))[:-1]:
        if not keep_multiples_of or int(old.name.removeprefix("step_")) % keep_multiples_of:
            shutil.rmtree(old)


def load_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None = None, check: Callable[[dict], None] | None = None,
) -> tuple[int, dict] | None:  # fmt: skip
    """Restore the newest complete state; returns (next step, extra), or None if there is none.

    The tensors of `average` are filled with the averaged weights of their names. `check` gets extra
    before anything is restored, and raises when this is no state to go on from.
    """
    found = sorted(directory.glob("step_*"))
    if not found:
        return None
    # Our own file of primitives and generator states; weights_only would refuse Python's tuples.
    meta = torch.load(found[-1] / "meta.pt", weights_only=False)
    if check:
        check(meta["extra"])
    state = {"model": model.state_dict()}
    if meta["stepped"]:
        _materialise(optimizer)
        state["optimizer"] = _flatten(optimizer.state_dict())
    if average:
        state["average"] = average
    with _quiet():
        dcp.load(state, checkpoint_id=found[-1] / "tensors", no_dist=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(
        {"state": _unflatten(state.get("optimizer", {})), "param_groups": meta["groups"]}
    )
    _set_random_state(meta["random"])
    return meta["step"], meta["extra"]


@contextlib.contextmanager
def _quiet():
    """Without the warning that a single process is assumed: it is, by design."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        yield


def _flatten(state: dict) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }


def _unflatten(flat: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh optimiser its state tensors, so that the checkpoint has somewhere to go."""
    if optimizer.state:
        return
    saved = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    for group, lr in zip(optimizer.param_groups, saved, strict=True):
        group["lr"] = lr
