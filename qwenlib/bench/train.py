"""Our training loop against transformers' `Trainer`: the same steps, tokens a second and memory.

Both begin with the weights of one model folder, read the same packed rows and take the same AdamW
steps in fp32 weights, with products in fp32 or under bf16 autocast. Shapes: B rows, T time.
"""

import importlib.util
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenlib.bench.cases import SkipCase, Task
from qwenlib.bench.memory import in_new_process, peak_mb
from qwenlib.data.packing import IGNORE, PackedBatch
from qwenlib.model import Qwen, QwenConfig, save_pretrained
from qwenlib.model.checkpoint import load_pretrained
from qwenlib.training import TrainConfig, losses, train

DOCUMENTS = 3  # of a row
# Nats by which the losses of a step may differ: some ten times what rounding was seen to do.
TOLERANCE = {"none": 5e-5, "bfloat16": 1e-3}


@dataclass(frozen=True)
class Job:
    """What both sides do: `steps` optimiser steps of `rows` x `tokens`, from one initialisation.

    micro_rows: rows that our loop holds together; the Trainer is tried with these and with all.
    autocast: none or bfloat16.
    """

    config: QwenConfig
    rows: int
    tokens: int
    micro_rows: int
    steps: int
    autocast: str = "none"
    learning_rate: float = 3e-3

    def settings(self) -> TrainConfig:
        return TrainConfig(
            max_steps=self.steps, learning_rate=self.learning_rate, warmup_share=0.0,
            schedule="constant", autocast=self.autocast,
        )  # fmt: skip

    def batch(self, step: int) -> PackedBatch:
        """Rows of three documents each, of tokens as uneven as those of a text."""
        random, shape = np.random.default_rng([0, step]), (self.rows, self.tokens)
        input_ids_BT = (self.config.vocab_size * random.random(shape) ** 3).astype(np.int64)
        labels_BT, position_ids_BT = input_ids_BT.copy(), np.empty_like(input_ids_BT)
        document_ids_BT = np.empty_like(input_ids_BT)
        for row in range(self.rows):
            cuts = random.choice(np.arange(1, self.tokens), DOCUMENTS - 1, replace=False)
            ends = [0, *sorted(cuts.tolist()), self.tokens]
            for document, (start, stop) in enumerate(zip(ends, ends[1:])):
                labels_BT[row, start] = IGNORE
                position_ids_BT[row, start:stop] = np.arange(stop - start)
                document_ids_BT[row, start:stop] = document
        arrays = (input_ids_BT, labels_BT, position_ids_BT, document_ids_BT)
        return PackedBatch(*(torch.from_numpy(array) for array in arrays))


def training(
    device: torch.device, dtype: torch.dtype, *, config: QwenConfig, memory: bool = True, **sizes
) -> Task:
    """The task: both sides train anew in each call and give their loss of every step.

    memory: also take each side's peak memory, in a process of its own. sizes: those of `Job`. dtype
    is that of the weights, float32.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise SkipCase("transformers' Trainer needs accelerate: pip install -e '.[test]'")
    job = Job(config, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Qwen(config).initialise(0), folder)
        ours = Ours(job, device, folder)
        peers = {
            "one batch": Theirs(job, device, folder, job.rows),
            "micro-batches": Theirs(job, device, folder, job.micro_rows),
        }

    start = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}

    def prepare() -> None:
        for side in (ours, *peers.values()):
            side.model.load_state_dict(start)
            side.prepare()

    def peak(label: str | None) -> float:
        micro_rows = None if label is None else peers[label].micro_rows
        return in_new_process(_peak_of_side, job, device, micro_rows)

    return Task(
        ours=ours,
        peers=dict(peers),
        amount=job.steps * job.rows * job.tokens,
        difference=partial(curves_differ, limit=TOLERANCE[job.autocast]),
        library="transformers' Trainer",
        prepare=prepare,
        peak_mb=peak if memory else None,
    )


class Ours:
    """`qwenlib.training.train` on the weights of `folder`."""

    def __init__(self, job: Job, device: torch.device, folder: str | Path):
        self.job, self.device = job, device
        self.model = load_pretrained(folder, device=device, dtype=torch.float32)

    def prepare(self) -> None:
        """Nothing is left of a call."""

    def __call__(self) -> list[float]:
        job = self.job

        def batches(step: int) -> list[PackedBatch]:
            batch = job.batch(step).to(self.device)
            return [batch.rows(i, i + job.micro_rows) for i in range(0, job.rows, job.micro_rows)]

        result = train(
            self.model, batches, losses.next_token_loss, job.settings(), show_progress=False
        )
        return [row["loss"] for row in result.history]


class Theirs:
    """transformers' `Trainer` on the same weights and rows, `micro_rows` of them at a time.

    It hears of documents by their positions, which restart, and counts the labels of a whole step
    before it divides, as ours does. Settings are its own where no result depends on them.
    """

    def __init__(self, job: Job, device: torch.device, folder: str | Path, micro_rows: int):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.job, self.device, self.micro_rows = job, device, micro_rows
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.to(device)
        self.trainer: Any = None

    def prepare(self) -> None:
        """A Trainer that has not trained yet."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        job, settings = self.job, self.job.settings()
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written
            max_steps=job.steps,
            per_device_train_batch_size=self.micro_rows,
            gradient_accumulation_steps=job.rows // self.micro_rows,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_epsilon=settings.eps,
            max_grad_norm=settings.grad_clip,
            optim="adamw_torch_fused",
            bf16=job.autocast == "bfloat16",
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            use_cpu=self.device.type == "cpu",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=self.device.type == "cuda",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else it would spread over all it finds
        self.trainer = Trainer(
            self.model, arguments, train_dataset=self._rows(), data_collator=_stacked
        )
        self.trainer.remove_callback(PrinterCallback)

    def __call__(self) -> list[float]:
        self.trainer.train()
        return [row["loss"] for row in self.trainer.state.log_history if "loss" in row]

    def _rows(self) -> list[dict[str, torch.Tensor]]:
        batches = [self.job.batch(step) for step in range(self.job.steps)]
        return [
            {
                "input_ids": batch.input_ids_BT[row],
                "position_ids": batch.position_ids_BT[row],
                "labels": batch.labels_BT[row],
            }
            for batch in batches
            for row in range(self.job.rows)
        ]


def curves_differ(ours: list[float], theirs: list[float], limit: float) -> str:
    """Losses step by step; limit in nats."""
    if len(ours) != len(theirs):
        return f"{len(ours)} steps here, {len(theirs)} there"
    for step, (a, b) in enumerate(zip(ours, theirs), start=1):
        if not abs(a - b) <= limit:
            return f"the loss of step {step} is {a:.6f} here, {b:.6f} there"
    return ""


def _peak_of_side(job: Job, device: torch.device, micro_rows: int | None) -> float:
    """Peak MB of one side's training, its weights included; micro_rows None: ours."""
    from transformers import Trainer  # noqa: F401  both begin with the same modules in memory

    def work() -> None:
        side = (
            Ours(job, device, folder)
            if micro_rows is None
            else Theirs(job, device, folder, micro_rows)
        )
        side.prepare()
        side()

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Qwen(job.config).initialise(0), folder)
        return peak_mb(work, device)


def _stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
