"""A small sweep of real training runs: the points that our own scaling law is fitted to.

Every run trains from scratch with its own full schedule: the loss in the middle of a longer
schedule is not the loss of a shorter run, because the learning rate has not come down yet.
A run's row is appended to `sweep.csv` under a hash of its settings when it is done, so that a
sweep that was killed goes on with the next run.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from qwenlib.data.sampler import PretrainSampler
from qwenlib.data.shards import TokenShards
from qwenlib.model.accounting import flops_per_token, parameter_count
from qwenlib.model.config import QwenConfig
from qwenlib.model.transformer import Qwen
from qwenlib.notebook import die_with_parent
from qwenlib.training.loop import TrainConfig, train
from qwenlib.training.losses import held_out_loss, next_token_loss

FIELDS = (
    "key", "hidden_size", "num_hidden_layers", "steps", "learning_rate", "seed",
    "N", "N_body", "D", "C", "train_loss", "heldout_loss", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class SweepRun:
    """Everything that determines the result of one run; equal settings give an equal `key`."""

    hidden_size: int
    num_hidden_layers: int
    head_dim: int
    ffn_ratio: int  # intermediate_size / hidden_size
    vocab_size: int
    seq_len: int
    batch_size: int  # rows of one optimiser step
    steps: int
    learning_rate: float
    eval_batches: int  # held-out batches of batch_size rows
    data: str  # identifies the training and held-out tokens
    seed: int = 0
    rope_theta: float = 10_000.0
    schedule: str = "cosine"
    autocast: str = "none"

    @property
    def key(self) -> str:
        """Hash of all settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def config(self) -> QwenConfig:
        """Dense Qwen2.5 of this size: two query heads a key/value head where even, tied head."""
        heads = self.hidden_size // self.head_dim
        if heads < 1 or self.hidden_size % self.head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}"
            )
        return QwenConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_ratio * self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else 1,
            max_position_embeddings=self.seq_len,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            tie_word_embeddings=True,
        )

    @property
    def N(self) -> int:
        """All parameters, the tied embedding counted once."""
        return parameter_count(self.config).total

    @property
    def N_body(self) -> int:
        """Parameters without the embedding."""
        return parameter_count(self.config).non_embedding

    @property
    def D(self) -> int:
        """Training tokens."""
        return self.steps * self.batch_size * self.seq_len

    @property
    def C(self) -> float:
        """Training FLOPs, head and attention counted."""
        return self.D * flops_per_token(self.config, self.seq_len, training=True)


def data_id(*shards: TokenShards) -> str:
    """Short hash of the tokens, so that a row is never reused for other data."""
    digests = "".join(s.meta["sha256"] for s in shards)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def run_sweep(
    runs: Iterable[SweepRun],
    train_shards: TokenShards,
    heldout_shards: TokenShards,
    path: str | Path,
    device="cpu",
    log: Callable[[dict, int], None] | None = None,
    workers: int = 1,
) -> list[dict]:
    """Train each run that `path` does not hold yet; returns the rows of `runs`, in their order.

    On a CPU every run gets one thread, and `workers` processes train side by side: models this
    small gain nothing from a second thread, and a row must not depend on how many there are.
    A row holds FIELDS: N and N_body in parameters, D in tokens, C in FLOPs, losses in nats per
    token. Raises ValueError when a run was planned for other tokens than the shards given.
    """
    runs = list(runs)
    here = data_id(train_shards, heldout_shards)
    for run in runs:
        if run.data != here:
            raise ValueError(f"run {run.key} was planned for data {run.data}, these are {here}")
    rows = read_rows(path)

    def keep(run: SweepRun, row: dict) -> None:
        rows[run.key] = row
        _write_rows(path, rows.values())
        if log:
            log({k: v for k, v in row.items() if k != "key"}, runs.index(run))

    missing = [run for run in runs if run.key not in rows]
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu or min(workers, len(missing)) <= 1:
        for run in missing:
            with _threads(1 if on_cpu else None):
                keep(run, train_one(run, train_shards, heldout_shards, device))
        return [rows[run.key] for run in runs]
    folders = train_shards.directory, heldout_shards.directory
    spawn = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=die_with_parent, initargs=(os.getpid(),)
    ) as pool:
        longest_first = sorted(missing, key=lambda run: -run.C)
        futures = {pool.submit(_train_alone, run, *folders): run for run in longest_first}
        for future in tqdm(as_completed(futures), total=len(futures), desc="sweep",
                           file=sys.stdout, ascii=True, ncols=78):  # fmt: skip
            keep(futures[future], future.result())
    done = [rows.pop(run.key) for run in runs]
    _write_rows(path, [*rows.values(), *done])  # in the order of the plan, not of finishing
    return done


def _train_alone(run: SweepRun, train_dir: Path, heldout_dir: Path) -> dict:
    """`train_one` in a process of its own, on one thread."""
    torch.set_num_threads(1)
    shards = TokenShards(train_dir), TokenShards(heldout_dir)
    return train_one(run, *shards, show_progress=False)  # bars of several workers would mix


@contextlib.contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_one(
    run: SweepRun, train_shards: TokenShards, heldout_shards: TokenShards, device="cpu",
    show_progress: bool = True,
) -> dict:  # fmt: skip
    """Train one run from scratch and score it on the first held-out batches; one row of FIELDS."""
    started = time.perf_counter()
    model = Qwen(run.config).initialise(run.seed).to(device)
    sampler = PretrainSampler(train_shards, run.seq_len, run.batch_size, run.seed)
    config = TrainConfig(
        max_steps=run.steps,
        learning_rate=run.learning_rate,
        schedule=run.schedule,
        autocast=run.autocast,
    )
    result = train(
        model,
        lambda step: [sampler.batch(step).to(device)],
        next_token_loss,
        config,
        description=f"{run.hidden_size}x{run.num_hidden_layers} {run.steps} steps",
        show_progress=show_progress,
    )
    # Seed 0 always: every run of a sweep is scored on the same rows.
    heldout = PretrainSampler(heldout_shards, run.seq_len, run.batch_size, 0)
    batches = (heldout.batch(i).to(device) for i in range(run.eval_batches))
    last = result.history[-max(1, run.steps // 20) :]
    return {
        "key": run.key,
        "hidden_size": run.hidden_size,
        "num_hidden_layers": run.num_hidden_layers,
        "steps": run.steps,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "N": run.N,
        "N_body": run.N_body,
        "D": run.D,
        "C": run.C,
        "train_loss": sum(row["loss"] for row in last) / len(last),
        "heldout_loss": held_out_loss(model, batches),
        "seconds": time.perf_counter() - started,
    }


def read_rows(path: str | Path) -> dict[str, dict]:
    """Rows of a sweep file by key; empty when there is none. ValueError for other columns."""
    path = Path(path)
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {list(FIELDS)}")
        return {row["key"]: _numbers(row) for row in reader}


def _numbers(row: dict[str, str]) -> dict:
    whole = {"hidden_size", "num_hidden_layers", "steps", "seed", "N", "N_body", "D"}
    return {k: v if k == "key" else int(v) if k in whole else float(v) for k, v in row.items()}


def _write_rows(path: str | Path, rows: Iterable[dict] | Sequence[dict]) -> None:
    """The whole file anew and renamed into place: a killed sweep leaves no half row."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".csv.part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
