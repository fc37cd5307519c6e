"""A run that was cut off and resumed equals the straight run, bit for bit."""

import random
import tempfile

import numpy as np
import pytest
import torch

from qwenlib.data.packing import pack_rows
from qwenlib.model import Qwen, QwenConfig
from qwenlib.post_training.online_merging import OnlineMergingAdamW, task_vectors
from qwenlib.training import TrainConfig, next_token_loss, train
from qwenlib.training.loop import clear_state

V, STEPS = 31, 8


def model(seed=0) -> Qwen:
    shape = QwenConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return Qwen(shape).initialise(seed)


def batches(step):
    generator = torch.Generator().manual_seed(step)
    docs = [(torch.randint(0, V, (12,), generator=generator).tolist(), None) for _ in range(3)]
    return [pack_rows(docs, 16, pad_id=0)]


def noisy_loss(net, batch):
    """A loss that draws from all three global generators, as dropout would."""
    loss, count, _ = next_token_loss(net, batch)
    noise = torch.rand(()) + np.random.rand() + random.random()
    return loss * (1 + noise), count, {"noise": noise}


def config(**changes):
    values = {"max_steps": STEPS, "learning_rate": 1e-2, "save_every": 3, "eval_every": 4}
    return TrainConfig(**(values | changes))


def merging(net):
    start = {name: value.clone() for name, value in model(0).state_dict().items()}
    base = {name: value - 0.01 for name, value in start.items()}
    tau = task_vectors(net, start, base)
    return OnlineMergingAdamW(
        net.parameters(), tau, lr=1e-2, weight_decay=0.1, alpha=0.1, p=0.5, every=2
    )


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Cut(Exception):
    """Stands for the job's end."""


def run(folder, net, optimizer=None, cut_at=None, settings=None):
    def source(step):
        if step == cut_at:
            raise Cut
        return batches(step)

    return train(
        net, source, noisy_loss, settings or config(), out_dir=folder,
        evaluate=lambda m: {"first": next(m.parameters()).sum().item()},
        optimizer=optimizer(net) if optimizer else None,
    )  # fmt: skip


def rows(history):
    """What does not depend on the clock and the process."""
    timed = {"seconds", "tokens_per_second", "mfu", "peak_memory_mb"}
    return [{key: value for key, value in row.items() if key not in timed} for row in history]


def test_resume_before_any_step_had_a_label(tmp_path):
    def source(step, cut_at=None):
        if step == cut_at:
            raise Cut
        (batch,) = batches(step)
        if step < 4:
            batch.labels_BT.fill_(-100)
        return [batch]

    settings = config(eval_every=0)
    straight = train(model(0), source, next_token_loss, settings)
    with pytest.raises(Cut):
        train(model(0), lambda s: source(s, 4), next_token_loss, settings, out_dir=tmp_path)
    resumed = train(model(0), source, next_token_loss, settings, out_dir=tmp_path)
    assert rows(resumed.history) == rows(straight.history)
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [None, merging])
@pytest.mark.parametrize(("cut_at", "ema_decay"), [(5, 0.0), (7, 0.9)])
def test_resumed_run_equals_the_straight_run(optimizer, cut_at, ema_decay):
    settings = config(ema_decay=ema_decay)
    with tempfile.TemporaryDirectory() as folder:
        seed_all(0)
        straight = run(None, model(0), optimizer, settings=settings)
        seed_all(0)
        cut = False
        try:
            run(folder, model(0), optimizer, cut_at, settings)
        except Cut:
            cut = True
        assert cut
        seed_all(99)
        resumed = run(folder, model(7), optimizer, settings=settings)  # other weights, generators
    assert rows(resumed.history) == rows(straight.history)
    assert resumed.evaluations == straight.evaluations
    weights = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    if ema_decay:
        assert resumed.average.updates == straight.average.updates == STEPS
        for name, average in straight.average.weights.items():
            assert torch.equal(resumed.average.weights[name], average), name


def test_only_the_newest_state_stays_and_can_be_cleared(tmp_path):
    seed_all(0)
    result = run(tmp_path, model())
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["history.jsonl", "step_00000006"]
    again = run(tmp_path, model(7))  # from step 6, two steps to go
    assert rows(again.history)[:6] == rows(result.history)[:6]
    clear_state(tmp_path)
    assert not (tmp_path / "state").exists()
    clear_state(tmp_path)  # nothing there: nothing to do


def test_every_nth_state_stays_for_good(tmp_path):
    run(tmp_path, model(), settings=config(save_every=1, keep_every=3))
    names = sorted(path.name for path in (tmp_path / "state").glob("step_*"))
    assert names == ["step_00000003", "step_00000006", "step_00000007"]
    again = run(tmp_path, model(7), settings=config(save_every=2, keep_every=0))
    assert [row["step"] for row in again.history][-1] == STEPS, "from the newest of them"


def test_a_lost_history_is_not_begun_with_todays_weights(tmp_path):
    """The weights of step 6 are not evaluated as those of step 0; the gap is told of."""
    run(tmp_path, model())
    (tmp_path / "state" / "history.jsonl").unlink()
    with pytest.warns(UserWarning, match="0 of the 6 steps"):
        again = run(tmp_path, model(7))
    assert [row["step"] for row in again.history] == [7, 8]
    assert [row["step"] for row in again.evaluations] == [8]


def test_an_interrupted_write_is_not_taken_for_a_state(tmp_path):
    seed_all(0)
    with pytest.raises(Cut):
        run(tmp_path, model(), cut_at=4)
    (tmp_path / "state" / ".partial_00000006").mkdir()
    seed_all(0)
    resumed = run(tmp_path, model())
    assert [row["step"] for row in resumed.history] == list(range(1, STEPS + 1))


def test_other_settings_are_refused_by_name(tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, model(), cut_at=4)
    with pytest.raises(ValueError, match="settings of learning_rate, schedule"):
        run(tmp_path, model(), settings=config(learning_rate=2e-2, schedule="linear"))
    net = model(7)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="settings of ema_decay"):
        run(tmp_path, net, settings=config(ema_decay=0.9))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before)), "nothing was loaded"


def test_without_save_every_nothing_is_written(tmp_path):
    run(tmp_path, model(), settings=config(save_every=0, max_steps=2))
    assert not list(tmp_path.iterdir())
