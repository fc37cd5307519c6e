"""The Trainer takes the steps our loop takes, and what is timed and weighed is the training."""

import dataclasses
import statistics
import tempfile

import pytest
import torch

from qwenlib.bench import runner
from qwenlib.bench.cases import Case, SkipCase
from qwenlib.bench.memory import in_new_process, peak_mb
from qwenlib.bench.train import DOCUMENTS, Job, Ours, Theirs, curves_differ, training
from qwenlib.data.packing import IGNORE
from qwenlib.model import QwenConfig

CPU = torch.device("cpu")
CONFIG = QwenConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rope_theta=100.0, tie_word_embeddings=True,
)  # fmt: skip
# A rate at which Adam's moments, decay and clipping show within a few steps.
JOB = Job(CONFIG, rows=4, tokens=16, micro_rows=2, steps=6, learning_rate=0.02)
SIZES = {field.name: getattr(JOB, field.name) for field in dataclasses.fields(JOB)}


def curves(**peer):
    """Losses of both sides, the Trainer with other settings."""
    from qwenlib.model import Qwen, save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Qwen(CONFIG).initialise(0), folder)
        ours = Ours(JOB, CPU, folder)
        theirs = Theirs(dataclasses.replace(JOB, **peer), CPU, folder, JOB.micro_rows)
    theirs.prepare()
    return ours(), theirs()


def test_both_take_the_same_steps():
    """Six steps with momentum, decay, clipping, documents and unequal micro-batches."""
    ours, theirs = curves()
    assert curves_differ(ours, theirs, 5e-5) == ""
    assert ours[0] - ours[-1] > 0.1, "nothing is learnt, so nothing is compared"
    assert curves_differ(*curves(learning_rate=0.021), 5e-5).startswith("the loss of step 2")


def test_every_call_begins_anew():
    task = training(CPU, torch.float32, memory=False, **SIZES)
    assert set(task.peers) == {"one batch", "micro-batches"} and task.peak_mb is None
    for side in (task.ours, *task.peers.values()):
        task.prepare()
        first = side()
        task.prepare()
        assert side() == first and len(first) == JOB.steps
    assert task.amount == 6 * 4 * 16


def test_rows_hold_documents_without_their_first_label():
    batch = JOB.batch(0)
    for ids, labels, positions, documents in zip(
        batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, batch.document_ids_BT
    ):
        starts = [int((documents == d).nonzero()[0]) for d in range(DOCUMENTS)]
        assert (labels == IGNORE).nonzero().flatten().tolist() == starts
        assert (positions == 0).nonzero().flatten().tolist() == starts
        kept = labels != IGNORE
        assert torch.equal(labels[kept], ids[kept])
        assert torch.equal(positions.diff() == 1, documents.diff() == 0)
    assert torch.equal(batch.input_ids_BT, JOB.batch(0).input_ids_BT)
    assert not torch.equal(batch.input_ids_BT, JOB.batch(1).input_ids_BT)


def test_curves_that_differ_are_named():
    assert curves_differ([1.0, 2.0], [1.0, 2.0 + 1e-6], 1e-5) == ""
    assert "step 2 is 2.000000 here" in curves_differ([1.0, 2.0], [1.0, 2.1], 1e-5)
    assert "step 1" in curves_differ([float("nan")], [1.0], 1e-5)
    assert curves_differ([1.0], [1.0, 1.0], 1e-5) == "1 steps here, 2 there"


def test_another_loop_is_refused(monkeypatch):
    """A Trainer that sees across documents is not timed."""
    rows = Theirs._rows
    monkeypatch.setattr(
        Theirs, "_rows",
        lambda self: [row | {"position_ids": torch.arange(16)} for row in rows(self)],
    )  # fmt: skip
    case = Case("crooked", "train", "", training, {**SIZES, "memory": False})
    report = runner.run([case], rounds=1, threads=1)
    assert report.rows == [] and "the loss of step 1" in report.refused["crooked"]


def test_without_accelerate_the_case_is_skipped(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SkipCase, match="accelerate"):
        training(CPU, torch.float32, **SIZES)


def test_peak_is_the_highest_moment_above_the_start():
    """Wide bounds and medians: other threads of this process take and free memory meanwhile."""
    keep = torch.ones(50_000_000)  # 200 MB that were there before

    def work():
        for _ in range(3):
            torch.ones(50_000_000)  # 200 MB, freed each time

    def peak(work):
        return statistics.median(peak_mb(work, CPU) for _ in range(3))

    assert 100 < peak(work) < 300  # the second and third: an earlier peak does not hide a later one
    assert peak(lambda: None) < 100
    assert float(keep.sum()) == 5e7


def test_errors_of_the_other_process_come_back():
    with pytest.raises(ZeroDivisionError):
        in_new_process(divmod, 1, 0)


@pytest.mark.slow
def test_memory_of_both_sides():
    """The Trainer holds whole logits in fp32 more than once, ours some rows of them."""
    sizes = SIZES | {"config": CONFIG.replace(vocab_size=50_000), "tokens": 64, "steps": 2}
    case = Case("heavy", "train", "", training, sizes)
    row = runner.measure(case, CPU, torch.float32, 1, 10.0)
    logits_mb = 4 * 64 * 50_000 * 4 / 1e6
    parameters_mb = 50_000 * 32 * 4 / 1e6
    assert row["peer_mb"] > 2 * logits_mb + 3 * parameters_mb
    assert 3 * parameters_mb < row["ours_mb"] < row["peer_mb"]
