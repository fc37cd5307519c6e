"""How fast a step was and how well it used the machine; and its loss in bits a byte."""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qwenlib import machine
from qwenlib.model import QwenConfig
from qwenlib.model.accounting import flops_per_token
from qwenlib.model.gpus import gpu_of
from qwenlib.training.distributed import world_size
from qwenlib.training.losses import IGNORED


class Meter:
    """Tokens, tokens a second, model FLOPs utilisation (MFU) and peak memory of each step.

    Tokens are those that went through the model, padding included. The MFU is the arithmetic that
    the model's shape asks for over what the device could have done in the time: attention counts as
    if each row were one document, recomputed activations do not count (arXiv 2204.02311,
    appendix B). The time of a step includes making its batch, not evaluating or saving. The peak is
    a GPU's dense bf16 rate by its data sheet, whatever the dtype; of a CPU, or a GPU without one
    here, the best that a matrix product reached with today's threads. Micro-batches that have no
    `row_shape` (rows, tokens a row) give no tokens; a model without a `QwenConfig` gives no MFU.
    """

    def __init__(self, model: nn.Module, device: torch.device, autocast: str):
        config = getattr(model, "config", None)
        self.config = config if isinstance(config, QwenConfig) else None
        self.device, self.seen = device, False
        weights = next(model.parameters()).dtype
        self.dtype = torch.bfloat16 if autocast == "bfloat16" else weights

    def start(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()

    def work(self, shapes: Sequence[tuple[int, int]]) -> list[float]:
        """[tokens, FLOPs] that micro-batches of these shapes ask of the model, both passes."""
        tokens = flops = 0.0
        for rows, length in shapes:
            tokens += rows * length
            if rows and self.config:
                flops += rows * length * flops_per_token(self.config, length, training=True)
        return [tokens, flops]

    def read(self, tokens: float, flops: float) -> dict[str, float]:
        """Of the step that ends: its speed, given what all ranks did together."""
        seconds = time.perf_counter() - self.began
        row = {}
        self.seen = self.seen or tokens > 0  # once there, the keys stay: rows have the same columns
        if self.seen:
            row |= {"tokens": tokens, "tokens_per_second": tokens / seconds}
        if self.seen and self.config:
            most = peak_flops(self.device, self.dtype, torch.get_num_threads()) * world_size()
            row["mfu"] = flops / seconds / most
        return row | {"peak_memory_mb": machine.peak_memory_mb(self.device)}


def progress(row: dict[str, float]) -> str:
    """The row of a step in a few words, for the progress bar."""
    words = [f"loss {row['loss']:.3f}"]
    if "tokens_per_second" in row:
        words.append(f"{row['tokens_per_second'] / 1000:.3g}k tok/s")
    if "mfu" in row:
        words.append(f"MFU {100 * row['mfu']:.0f}%")
    return ", ".join(words)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s that a step is measured against (see `Meter`). Draws no random numbers of the run."""
    if device.type == "cuda" and (gpu := gpu_of(torch.cuda.get_device_name(device))):
        return gpu.flops
    size = 512 if device.type == "cpu" else 8192
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return max(machine.matmul_speed(size, 1, device, dtype) for _ in range(8))


def in_bytes(loss_fn: Callable[..., tuple], byte_lengths_V: Tensor) -> Callable[..., tuple]:
    """loss_fn of a `PackedBatch`, with what the loop needs to say bits a byte of each step.

    byte_lengths_V: bytes of every token (`byte_lengths`). The bytes are those of the targets in the
    batch, so the figure is exact, not a mean ratio.
    """

    def with_bytes(model, batch):
        loss_sum, count, stats = loss_fn(model, batch)
        targets_BT = batch.labels_BT[:, 1:]
        lengths_V = byte_lengths_V.to(targets_BT.device)
        size = lengths_V[targets_BT[targets_BT != IGNORED]].sum()
        least = count.clamp(min=1)
        text = {"text_nats": loss_sum.detach() / least, "text_bytes": size / least}
        return loss_sum, count, stats | text

    return with_bytes


def bits_a_byte(stats: dict[str, float]) -> dict[str, float]:
    """Statistics with text_nats and text_bytes, of whatever unit, replaced by bits_per_byte."""
    stats = dict(stats)
    nats, size = stats.pop("text_nats", None), stats.pop("text_bytes", None)
    return stats | {"bits_per_byte": nats / size / math.log(2)} if size else stats


def byte_lengths(tokenizer, rows: int | None = None) -> Tensor:
    """UTF-8 bytes of each token, int64; control tokens stand for no text and have none.

    rows: of the model's head, when it has more than the tokenizer has tokens.
    """
    lengths_V = torch.zeros(max(rows or 0, tokenizer.vocab_size), dtype=torch.long)
    control = set(tokenizer.control.values())
    for token in range(tokenizer.vocab_size):
        if token not in control:
            lengths_V[token] = len(tokenizer.token_bytes(token))
    return lengths_V
