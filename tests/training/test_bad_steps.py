"""Bad steps: what counts as one, how it is named, and that it moves nothing."""

import json
import math
import warnings

import pytest
import torch

from qwenlib.training import next_token_loss, train
from qwenlib.training.bad_steps import ENOUGH, MOST_IN_A_ROW, name_batch, why_bad
from tests.training.test_loop import batch, model, settings

STEADY = [{"loss": 2.0, "grad_norm": 1.0, "count": 5.0, "skipped": 0.0}] * ENOUGH


def test_what_is_bad():
    for value in (math.nan, math.inf, -math.inf):
        assert "loss" in (why_bad(value, 1.0, [], 0.0) or "")
        assert "norm" in (why_bad(1.0, value, [], 0.0) or "")
    assert why_bad(1e9, 1e9, STEADY, 0.0) is None, "spikes are not looked for unless asked"
    assert why_bad(6.0, 3.0, STEADY, 3.0) is None
    assert "loss 6.1 is above 3 times 2" in why_bad(6.1, 3.0, STEADY, 3.0)
    assert "norm 3.1 is above 3 times 1" in why_bad(6.0, 3.1, STEADY, 3.0)
    assert why_bad(6.1, 3.1, STEADY[1:], 3.0) is None, "too few to know what is usual"
    assert why_bad(-6.0, 1.0, [row | {"loss": -2.0} for row in STEADY], 2.0) is None


def test_the_median_is_that_of_good_recent_steps():
    odd = [{"loss": 50.0, "grad_norm": 50.0, "count": 5.0, "skipped": 1.0}] * ENOUGH
    empty = [{"loss": 0.0, "grad_norm": 0.0, "count": 0.0, "skipped": 0.0}] * 30
    assert why_bad(6.1, 1.0, STEADY + odd, 3.0) is not None
    assert why_bad(5.0, 1.0, STEADY + empty, 3.0) is None
    long_ago = [row | {"loss": 100.0} for row in STEADY] * 20
    assert why_bad(6.1, 1.0, long_ago + STEADY * 5, 3.0) is not None


def spoilt(bad_steps, poison):
    """Two micro-batches a step; the second of a bad step is poisoned in its labels' place."""

    def batches(step):
        rows = batch(step)
        half = len(rows.input_ids_BT) // 2
        return [(step, rows.rows(0, half)), (step, rows.rows(half, 2 * half))]

    def loss_fn(net, item):
        step, rows = item
        loss, count, stats = next_token_loss(net, rows)
        if step in bad_steps:
            loss, count = poison(loss, count)
        return loss, count, stats

    return batches, loss_fn


def test_a_skipped_step_equals_a_step_without_labels():
    """Weights, moments and the schedule go on as if its batch had been empty."""
    runs = []
    for poison in (lambda loss, n: (loss * math.nan, n), lambda loss, n: (0.0 * loss, 0 * n)):
        changes = settings(max_steps=6, on_bad_step="skip")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.append(train(model(), *spoilt({2, 3}, poison), changes, show_progress=False))
    skipped, empty = runs
    assert [row["skipped"] for row in skipped.history] == [0, 0, 1, 1, 0, 0]
    assert [row["skipped"] for row in empty.history] == [0] * 6
    assert skipped.tokens == empty.tokens > 0
    for a, b in zip(skipped.model.parameters(), empty.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in skipped.history[4:]] == [r["loss"] for r in empty.history[4:]]


def test_a_spike_is_skipped_and_its_batch_named(tmp_path):
    changes = settings(max_steps=24, learning_rate=1e-4, on_bad_step="skip", spike_factor=3.0)
    source = spoilt({22}, lambda loss, n: (10 * loss, n))
    with pytest.warns(UserWarning, match=r"skipped step 23: loss .* is above 3 times") as caught:
        result = train(model(), *source, changes, out_dir=tmp_path, show_progress=False)
    assert [row["step"] for row in result.history if row["skipped"]] == [23]
    (note,) = [w for w in caught if "skipped" in str(w.message)]
    assert "micro-batch 1 of 2" in str(note.message)
    kept = json.loads((tmp_path / "bad_steps" / "step_00000023.json").read_text())
    rows = batch(22)
    rows = rows.rows(0, len(rows.input_ids_BT) // 2)
    assert kept["micro_batches"][0]["batch"][1]["input_ids_BT"] == rows.input_ids_BT.tolist()


def test_a_stopped_run_goes_on_from_its_last_state_and_skips(tmp_path):
    """Spikes are measured against the history on disk: as if the run had never stopped."""

    def go(on_bad_step, folder=None, save_every=0):
        changes = settings(
            max_steps=28, learning_rate=1e-3, spike_factor=3.0, on_bad_step=on_bad_step,
            save_every=save_every,
        )  # fmt: skip
        source = spoilt({22, 24}, lambda loss, n: (10 * loss, n))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(model(), *source, changes, out_dir=folder, show_progress=False)

    straight = go("skip")
    with pytest.raises(FloatingPointError, match="step 23: loss .* above 3 times"):
        go("stop", tmp_path, 10)
    assert (tmp_path / "state" / "step_00000020").is_dir(), "the last state stays"
    resumed = go("skip", tmp_path, 7)
    assert [row["step"] for row in resumed.history if row["skipped"]] == [23, 25]
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_too_many_bad_steps_in_a_row_stop_the_run():
    first, all_bad = 3, settings(max_steps=40, on_bad_step="skip")
    source = spoilt(set(range(first, 40)), lambda loss, n: (loss * math.inf, n))
    stopped_at = first + MOST_IN_A_ROW + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FloatingPointError, match=f"step {stopped_at}: loss"):
            train(model(), *source, all_bad, show_progress=False)


class Named:
    def __init__(self, name):
        self.name = name

    def describe(self):
        return f"rows of {self.name}"


def test_the_micro_batch_to_blame_says_its_rows(tmp_path):
    parts, nan = [Named("a"), Named("b"), 3], math.nan
    got = name_batch(7, "loss nan", nan, parts, [1.0, nan, 2.0], None)
    assert got == "micro-batch 2 of 3 (rows of b): loss nan"
    all_of_them = name_batch(7, "norm inf", 1.5, parts[1:], [1.0, 2.0], tmp_path)
    assert "micro-batch 1 of 2 (rows of b): loss 1, micro-batch 2 of 2: loss 2;" in all_of_them
    assert str(tmp_path / "bad_steps" / "step_00000007.json") in all_of_them
    assert "and 6 more" in name_batch(7, "norm inf", 1.0, [0] * 10, [1.0] * 10, None)


def test_a_rank_blames_its_own_micro_batches(tmp_path, monkeypatch):
    from qwenlib.training import bad_steps

    monkeypatch.setattr(bad_steps, "world_size", lambda: 4)
    monkeypatch.setattr(bad_steps, "rank", lambda: 2)
    fine = name_batch(7, "loss nan", math.nan, [1, 2], [1.0, 2.0], tmp_path)
    assert fine == "no micro-batch of rank 2 is to blame" and not list(tmp_path.iterdir())
    bad = name_batch(7, "loss nan", math.nan, [1, 2], [1.0, math.nan], tmp_path)
    assert bad.startswith("micro-batch 2 of 2 of rank 2: loss nan; see ")
    (file,) = (tmp_path / "bad_steps").iterdir()
    assert file.name == "step_00000007_of_rank_2.json"
