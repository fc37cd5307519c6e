"""Several processes with a part of each batch equal one process with all of it."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from qwenlib.training import next_token_loss, train
from qwenlib.training.distributed import rank, sum_over_ranks, world_size
from tests.training.test_loop import batch, model, settings

STEPS, RANKS = 20, 2


def test_alone_is_a_group_of_one():
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_ranks([0.1, 3.0], torch.device("cpu")) == [0.1, 3.0]


def part(step: int, number: int, of: int):
    rows = batch(step)
    edges = [len(rows.input_ids_BT) * i // of for i in range(of + 1)]
    return rows.rows(edges[number], edges[number + 1])


def one_rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS
    )
    result = train(
        model(), lambda step: [part(step, number, RANKS)], next_token_loss,
        settings(max_steps=STEPS), show_progress=False,
    )  # fmt: skip
    kept = {"history": result.history, "weights": result.model.state_dict()}
    torch.save(kept, f"{folder}/rank{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one():
    alone = train(
        model(), lambda step: [batch(step)], next_token_loss, settings(max_steps=STEPS),
        show_progress=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(one_rank, (folder,), RANKS)
        ranks = [torch.load(f"{folder}/rank{i}.pt") for i in range(RANKS)]
    assert part(0, 0, RANKS).num_targets != part(0, 1, RANKS).num_targets
    for key in ("loss", "grad_norm", "count", "token_accuracy", "tokens"):
        want = [row[key] for row in alone.history]
        assert [row[key] for row in ranks[0]["history"]] == pytest.approx(want, rel=1e-6), key
        assert [row[key] for row in ranks[1]["history"]] == [r[key] for r in ranks[0]["history"]]
    for name, want in alone.model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], want, atol=1e-5, rtol=0)
        assert torch.equal(ranks[1]["weights"][name], ranks[0]["weights"][name])
