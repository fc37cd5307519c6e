"""The timer against clocks that are set by hand."""

import gc
import math

import pytest

from qwenlib.bench.timing import compare, summarise


class Clock:
    """A clock that only the timed work moves forward."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def work(self, name, *seconds):
        """A callable that takes the given seconds, call by call, the last ones for ever."""
        left = list(seconds)

        def call():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call

    def __call__(self):
        return self.now


def test_ratio_is_above_one_when_ours_is_faster():
    clock = Clock()
    got = compare(clock.work("ours", 1.0), clock.work("peer", 3.0), 5, clock=clock)
    assert (got.ours, got.peer, got.rounds) == (1.0, 3.0, 5)
    assert got.ratio == got.ratio_low == got.ratio_high == 3.0


def test_rounds_alternate_who_goes_first():
    clock = Clock()
    compare(clock.work("o", 1.0), clock.work("p", 1.0), 3, warmup=1, clock=clock)
    assert "".join(clock.order) == "op" + "po" + "op" + "po"


def test_warm_up_rounds_do_not_count():
    clock = Clock()
    ours, peer = clock.work("o", 100.0, 100.0, 1.0), clock.work("p", 1.0, 1.0, 2.0)
    got = compare(ours, peer, 1, warmup=2, clock=clock)
    assert (got.ours, got.peer, got.ratio) == (1.0, 2.0, 2.0)


def test_ratio_is_of_paired_rounds():
    """A machine that slows down for both sides leaves the ratio alone."""
    got = summarise([1.0, 10.0, 2.0], [2.0, 20.0, 4.0])
    assert got.ratio == got.ratio_low == got.ratio_high == 2.0
    # Medians of the sides alone would say 3 / 2.
    assert summarise([1.0, 2.0, 10.0], [3.0, 8.0, 1.0]).ratio == 3.0


def test_interval_holds_the_ratio_and_grows_with_the_noise():
    calm = summarise([1.0] * 9, [1.9, 2.0, 2.1] * 3)
    wild = summarise([1.0] * 9, [1.0, 2.0, 3.0] * 3)
    for got in (calm, wild):
        assert got.ratio_low < got.ratio < got.ratio_high
    assert calm.ratio_high - calm.ratio_low < wild.ratio_high - wild.ratio_low
    assert calm == summarise([1.0] * 9, [1.9, 2.0, 2.1] * 3), "seeded"


def test_queued_work_is_waited_for():
    clock, queue = Clock(), []

    def wait():
        clock.now += math.fsum(queue)
        queue.clear()

    got = compare(
        lambda: queue.append(1.0), lambda: queue.append(4.0), 3, wait=wait, clock=clock
    )  # fmt: skip
    assert (got.ours, got.peer) == (1.0, 4.0)


def test_garbage_collection_rests_and_comes_back():
    seen = []
    compare(lambda: seen.append(gc.isenabled()), lambda: None, 2)
    assert seen == [False] * 3 and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        compare(lambda: 1 / 0, lambda: None, 2)
    assert gc.isenabled()


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        compare(lambda: None, lambda: None, 0)
