"""One training loop for every stage; stages differ in their batches and their loss function."""

from qwenlib.training.loop import TrainConfig, TrainResult, train
from qwenlib.training.losses import held_out_loss, next_token_loss

__all__ = ["TrainConfig", "TrainResult", "held_out_loss", "next_token_loss", "train"]
