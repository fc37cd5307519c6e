"""One training loop for every stage; stages differ in their batches and their loss function."""

from qwenlib.training.loop import TrainConfig, TrainResult, train
from qwenlib.training.losses import held_out_loss, next_token_loss
from qwenlib.training.preemption import Preempted

__all__ = ["Preempted", "TrainConfig", "TrainResult", "held_out_loss", "next_token_loss", "train"]
