"""What a step did a second, against arithmetic by hand, and its bits a byte against the text."""

import dataclasses
import math
import time
from unittest import mock

import pytest
import torch

from qwenlib.data.packing import pack_rows
from qwenlib.model import Qwen, QwenConfig
from qwenlib.model.accounting import flops_per_token
from qwenlib.model.gpus import GPUS, gpu_of
from qwenlib.tokenizer import Tokenizer, train_bpe
from qwenlib.training import held_out_loss, meter, next_token_loss, train
from qwenlib.training.losses import bits_per_byte
from tests.training.test_loop import batch, model, run, settings

CPU = torch.device("cpu")


def test_speed_by_hand():
    net = Qwen(QwenConfig(**dataclasses.asdict(model().config))).initialise(0)
    gauge = meter.Meter(net, CPU, "none")
    tokens, flops = gauge.work([(3, 16), (2, 10), (0, 0)])
    assert tokens == 3 * 16 + 2 * 10
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 61 * 32  # two layers and the head
    scores = [2 * 2 * 2 * 32 * (length + 1) / 2 for length in (16, 10)]  # layers, q k and p v, D
    want = 3 * (48 * (2 * weights + scores[0]) + 20 * (2 * weights + scores[1]))
    assert flops == want
    with (
        mock.patch.object(time, "perf_counter", side_effect=[10.0, 10.5]),
        mock.patch.object(meter, "peak_flops", lambda *what: 1e9),
    ):
        gauge.start()
        row = gauge.read(tokens, flops)
    assert row["tokens"] == 68 and row["tokens_per_second"] == 136
    assert row["mfu"] == pytest.approx(want / 0.5 / 1e9)
    assert row["peak_memory_mb"] > 10


def test_what_is_not_known_is_left_out():
    gauge = meter.Meter(torch.nn.Linear(2, 2), CPU, "none")
    gauge.start()
    assert set(gauge.read(*gauge.work([(0, 0), (0, 0)]))) == {"peak_memory_mb"}
    assert set(gauge.read(*gauge.work([(2, 3)]))) == {
        "tokens", "tokens_per_second", "peak_memory_mb",
    }  # fmt: skip


def test_the_columns_stay_when_a_step_has_no_rows():
    gauge = meter.Meter(model(), CPU, "none")
    gauge.start()
    full, empty = (gauge.read(*gauge.work(shapes)) for shapes in ([(2, 3)], []))
    assert set(full) == set(empty) and empty["tokens"] == empty["mfu"] == 0


def test_history_has_the_speed_of_every_step():
    rows = run(split=2, max_steps=3).history
    for step, row in enumerate(rows):
        assert row["tokens"] == math.prod(batch(step).row_shape)
        assert row["count"] == batch(step).num_targets < row["tokens"]
        assert row["mfu"] == pytest.approx(
            row["tokens_per_second"] * flops_per_token(model().config, 42, training=True)
            / meter.peak_flops(CPU, torch.float32, torch.get_num_threads())
        )  # fmt: skip


def test_the_peak_is_measured_once_without_random_numbers_of_the_run():
    meter.peak_flops.cache_clear()
    before = torch.get_rng_state()
    got = meter.peak_flops(CPU, torch.float32, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < got < 1e15 and meter.peak_flops(CPU, torch.float32, 1) == got


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_their_drivers_name(name, sheet):
    assert gpu_of(name) == (GPUS[sheet] if sheet else None)


TEXTS = ["the cat sat on the mat", "Grüße, 你好!", "x = {1: 'a'}\n" * 3, "the the the"]


def tokenizer() -> Tokenizer:
    return Tokenizer.from_merges(train_bpe(TEXTS, 286))


def test_bytes_of_tokens_add_up_to_the_text():
    tok = tokenizer()
    lengths_V = meter.byte_lengths(tok)
    assert len(lengths_V) == tok.vocab_size
    for text in TEXTS:
        ids = [*tok.encode(text), tok.end_of_text_id]
        assert int(lengths_V[ids].sum()) == len(text.encode())
    assert lengths_V.max() > 1, "merges were learnt"
    wide_V = meter.byte_lengths(tok, tok.vocab_size + 9)
    assert torch.equal(wide_V[: len(lengths_V)], lengths_V) and not wide_V[len(lengths_V) :].any()


def test_bits_a_byte_are_exact():
    """Over unequal micro-batches: all nats over all bytes of the targets, no mean of ratios."""
    tok = tokenizer()
    shape = dataclasses.replace(model().config, vocab_size=tok.vocab_size, initializer_range=0.3)
    net = Qwen(shape).initialise(0)
    docs = [(tok.encode(text), None) for text in TEXTS]
    longest = max(len(ids) for ids, _ in docs)  # a row without padding at its end
    rows = pack_rows(docs, longest, tok.pad_token_id)
    parts = [rows.rows(0, 1), rows.rows(1, len(rows.input_ids_BT))]
    assert parts[0].num_targets != parts[1].num_targets > 0
    nats = held_out_loss(net, [rows])
    targets = [token for ids, _ in docs for token in ids[1:]]
    size = sum(len(tok.token_bytes(token)) for token in targets)
    loss_fn = meter.in_bytes(next_token_loss, meter.byte_lengths(tok))
    row = train(net, lambda _: parts, loss_fn, settings(max_steps=1), show_progress=False).history[
        0
    ]
    assert row["bits_per_byte"] == pytest.approx(bits_per_byte(nats, len(targets), size), rel=1e-5)
    assert "text_nats" not in row and "text_bytes" not in row and "token_accuracy" in row


def test_progress_in_few_words():
    assert meter.progress({"loss": 2.34567}) == "loss 2.346"
    row = {"loss": 2.3, "tokens_per_second": 61_903.1, "mfu": 0.379}
    assert meter.progress(row) == "loss 2.300, 61.9k tok/s, MFU 38%"


def test_the_configs_type_is_looked_at():
    net = torch.nn.Linear(2, 2)
    net.config = {"hidden_size": 3}
    assert meter.Meter(net, CPU, "none").config is None
    assert isinstance(meter.Meter(model(), CPU, "none").config, QwenConfig)
