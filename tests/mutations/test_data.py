"""Edits of the token shards, samplers, mixtures and packing that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

SAMPLER = "qwenlib.data.sampler"
STREAM = "tests/data/test_sampler.py::test_one_stream_in_three_settings"

CASES = [
    Mutation("every rank reads the same rows", SAMPLER,
             "(step * self.world_size + self.rank) * self.batch_size",
             "step * self.world_size * self.batch_size", STREAM),
    Mutation("a step reads the rows of one rank", SAMPLER,
             "(step * self.world_size + self.rank) * self.batch_size",
             "(step + self.rank) * self.batch_size", STREAM),
    Mutation("micro-batches overlap", SAMPLER, "self._rows(first + i * rows, count)",
             "self._rows(first + i, count)", STREAM),
    Mutation("last micro-batch runs into the next rank's rows", SAMPLER,
             "count = min(rows, end - i * rows)", "count = rows", STREAM),
    Mutation("a micro-batch names the batch's rows", SAMPLER,
             "first_row=self.first_row + start)", "first_row=self.first_row)", STREAM),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
