"""Micro-batches side by side: the same sums as one after the other, bit for bit."""

import threading

import pytest
import torch

from qwenlib.model import MoEConfig, Qwen
from qwenlib.model.moe import load_balancing_loss, recorded_router
from qwenlib.training import next_token_loss, train
from qwenlib.training.gradients import Gradients
from tests.training.test_loop import batch, model, settings


@pytest.fixture(autouse=True)
def one_thread():
    """Each worker has one thread, so that a single one must have no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pieces(step, parts=3):
    whole = batch(step)
    rows = len(whole.input_ids_BT)
    return [whole.rows(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


def gradients_of(net, micro_batches, loss_fn, **options):
    net.zero_grad(set_to_none=True)
    with Gradients(list(net.parameters()), **options) as gradients:
        numbers = gradients(net, micro_batches, loss_fn)
    return numbers, [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_change_no_bit(workers, autocast):
    net = model()
    seen = set()

    def loss_fn(*arguments):
        seen.add(threading.get_ident())
        return next_token_loss(*arguments)

    one, want = gradients_of(net, pieces(0), loss_fn, autocast=autocast, workers=1)
    assert seen == {threading.get_ident()}
    many, got = gradients_of(net, pieces(0), loss_fn, autocast=autocast, workers=workers)
    assert len(seen) > 1, "other threads took part"
    assert one == many
    assert one[1] == sum(piece.num_targets for piece in pieces(0))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_micro_batch_is_made_once_and_when_its_turn_comes(workers):
    class Made(list):
        """Micro-batches that are made when they are asked for."""

        asked: list[int] = []

        def __getitem__(self, index):
            self.asked.extend(range(*index.indices(5)) if isinstance(index, slice) else [index])
            return super().__getitem__(index)

        def __iter__(self):
            return (self[i] for i in range(5))

    lazy, eager = Made(pieces(0, 5)), pieces(0, 5)
    lazy.asked = []
    seen = []

    def loss_fn(network, micro_batch):
        seen.append(len(lazy.asked))
        return next_token_loss(network, micro_batch)

    net = model()
    with Gradients(list(net.parameters()), workers=workers) as gradients:
        gradients(net, lazy, loss_fn)
        assert gradients.shapes == [part.row_shape for part in eager]
        assert gradients.losses == pytest.approx(
            [float(next_token_loss(net, part)[0].detach()) / part.num_targets for part in eager]
        )
    assert lazy.asked == list(range(5))
    assert seen == ([1, 2, 3, 4, 5] if workers == 1 else [2, 2, 4, 4, 5])


def test_whole_runs_are_equal_and_threads_come_back():
    results = []
    for workers in (1, 2):
        results.append(train(model(), pieces, next_token_loss, settings(workers=workers)))
    one, two = results
    assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    count = []
    other = threading.Thread(target=lambda: count.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert count == [1]


def test_gradients_add_to_those_that_are_there():
    net = model()
    _, want = gradients_of(net, pieces(0), next_token_loss, workers=2)
    want = [2 * gradient for gradient in want]
    with Gradients(list(net.parameters()), workers=2) as gradients:
        gradients(net, pieces(0), next_token_loss)
    for a, parameter in zip(want, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, a)


def test_a_parameter_out_of_use_keeps_no_gradient():
    net = model()
    idle = torch.nn.Parameter(torch.ones(3))
    with Gradients([*net.parameters(), idle], workers=2) as gradients:
        gradients(net, pieces(0), next_token_loss)
    assert idle.grad is None
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_each_thread_records_its_own_router():
    moe = MoEConfig(6, 2, 20, 28)
    net = Qwen(model().config.replace(moe=moe)).initialise(0)
    barrier = None

    def loss_fn(network, micro_batch):
        with recorded_router(network) as logits:
            if barrier is not None:
                barrier.wait()  # all of them are recording now
            loss_sum, count, stats = next_token_loss(network, micro_batch)
        assert len(logits) == network.config.num_hidden_layers
        return loss_sum + count * load_balancing_loss(logits, 2), count, stats

    one, want = gradients_of(net, pieces(0) * 4, loss_fn, workers=1)
    barrier = threading.Barrier(4, timeout=60)
    many, got = gradients_of(net, pieces(0) * 4, loss_fn, workers=4)
    assert one == many
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_an_error_in_a_worker_is_the_callers():
    def broken(network, micro_batch):
        raise ValueError("row 7 has no answer")

    with pytest.raises(ValueError, match="row 7 has no answer"):
        gradients_of(model(), pieces(0), broken, workers=2)
