"""20 steps of each kind of training on a CPU: a change of any bit here changes every run.

`tests/golden/losses_cpu.json` holds the losses as hexadecimal floats and where they were made.
There (same PyTorch, processor, vector instructions and threads) they must come out bit for bit,
elsewhere to 1e-4. After a change that is meant, write the file anew:

    OMP_NUM_THREADS=1 python -m tests.training.test_golden
"""

import json
import math
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qwenlib import machine
from qwenlib.data.sampler import PretrainSampler
from qwenlib.data.shards import write_shards
from qwenlib.kernels import cross_entropy
from qwenlib.model import MoEConfig, Qwen, QwenConfig
from qwenlib.model.moe import load_balancing_loss, recorded_router
from qwenlib.post_training.conversations import ConversationSampler
from qwenlib.post_training.preferences import Pair, PairSampler, pair_loss, summed_logprobs
from qwenlib.tokenizer import Tokenizer
from qwenlib.training import TrainConfig, next_token_loss, train

FILE = Path(__file__).parents[1] / "golden" / "losses_cpu.json"
STEPS, V = 20, 278  # 256 bytes and 22 control tokens
CHOSEN = 2  # experts of a token


def model(moe: MoEConfig | None = None) -> Qwen:
    config = QwenConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_theta=10_000.0, moe=moe,
    )  # fmt: skip
    return Qwen(config).initialise(0)


def pretraining(net: Qwen, loss_fn) -> list[dict]:
    """Packed rows from token shards, in two unequal micro-batches; clipping, decay, cosine."""
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(2, 60, size=120):
        start, stride = rng.integers(0, 250), rng.integers(1, 4)
        documents.append((start + stride * np.arange(length)) % 250)
    with tempfile.TemporaryDirectory() as folder:
        sampler = PretrainSampler(write_shards(folder, documents, V), 48, 5, seed=3)

        def batches(step):
            rows = sampler.batch(step)
            return [rows.rows(0, 2), rows.rows(2, 5)]

        return train(net, batches, loss_fn, settings(), show_progress=False).history


def settings(**changes) -> TrainConfig:
    values = {"max_steps": STEPS, "learning_rate": 1e-2, "workers": 1}
    return TrainConfig(**(values | changes))


def dense() -> list[dict]:
    return pretraining(model(), next_token_loss)


def mixture() -> list[dict]:
    def loss_fn(net, batch):
        with recorded_router(net) as logits:
            loss_sum, count, stats = next_token_loss(net, batch)
        return loss_sum + 0.01 * count * load_balancing_loss(logits, CHOSEN), count, stats

    return pretraining(model(MoEConfig(6, CHOSEN, 12, 24)), loss_fn)


def sft() -> list[dict]:
    """Masked conversations of unequal length, packed; two turns each."""
    rng = random.Random(0)
    conversations = []
    for _ in range(40):
        a, b = rng.randrange(10), rng.randrange(1000)
        conversations.append([
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{a} + {b}"},
            {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": str(a + b + 1) * rng.randrange(1, 5)},
        ])  # fmt: skip
    sampler = ConversationSampler(Tokenizer.from_merges([]), conversations, 128, 3, seed=1)
    changes = settings(schedule="linear", weight_decay=0.0)
    return train(
        model(), lambda step: [sampler.batch(step)], next_token_loss, changes, show_progress=False
    ).history


def dpo() -> list[dict]:
    rng = random.Random(0)

    def ids() -> list[int]:
        return [rng.randrange(250) for _ in range(rng.randrange(1, 12))]

    net, pairs = model(), [Pair(None, ids(), ids(), ids()) for _ in range(11)]
    sampler = PairSampler(pairs, summed_logprobs(net, pairs, 0), 4, 0, seed=2)
    changes = settings(learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999))
    return train(
        net, lambda step: [sampler.batch(step)], pair_loss(0.1), changes, show_progress=False
    ).history


CASES = {"dense": dense, "moe": mixture, "sft": sft, "dpo": dpo}


def here() -> dict:
    """What the bits depend on beside the code."""
    return {
        "torch": torch.__version__,
        "processor": machine.describe().processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compiled_loss": cross_entropy._compiled() is not None,
    }


def measured(case: str) -> tuple[dict, dict[str, list[float]]]:
    """Where it ran, on one thread, and the curves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        history = CASES[case]()
        return here(), {key: [row[key] for row in history] for key in ("loss", "grad_norm")}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_losses(case):
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    place, got = measured(case)
    for key, values in got.items():
        want = kept["runs"][case][key]
        if place == kept["made_on"]:
            assert [value.hex() for value in values] == want, key
        assert values == pytest.approx([float.fromhex(x) for x in want], rel=1e-4, abs=1e-4), key
    first = math.log(2) if case == "dpo" else math.log(V)
    assert got["loss"][0] == pytest.approx(first, abs=0.1)
    assert got["loss"][-1] < got["loss"][0] - 0.1, "it learns"


if __name__ == "__main__":
    results = {case: measured(case) for case in CASES}
    text = {
        "made_on": results["dense"][0],
        "runs": {
            case: {key: [value.hex() for value in values] for key, values in curves.items()}
            for case, (_, curves) in results.items()
        },
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
