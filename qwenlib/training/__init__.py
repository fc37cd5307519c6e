"""One training loop for every stage; stages differ in their batches and their loss function."""

from qwenlib.training.launch import RankFailed, launch
from qwenlib.training.loop import TrainConfig, TrainResult, train
from qwenlib.training.losses import held_out_loss, next_token_loss
from qwenlib.training.preemption import Preempted
from qwenlib.training.sharding import by_rank, shard, whole_weights

__all__ = [
    "Preempted", "RankFailed", "TrainConfig", "TrainResult", "by_rank", "held_out_loss", "launch",
    "next_token_loss", "shard", "train", "whole_weights",
]  # fmt: skip
