"""Edits of the token shards, samplers, mixtures and packing that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

SAMPLER = "qwenlib.data.sampler"
STREAM = "tests/data/test_sampler.py::test_one_stream_in_three_settings"
MIXED, MIXTURE = "qwenlib.data.mixture_sampler", "tests/data/test_mixture_sampler.py::"
SOURCES = MIXTURE + "test_each_source_is_read_in_its_own_order"

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
    Mutation("each block starts its sources again", MIXED,
             "block * self.rows_per_block[name] + int(ranks[index])", "int(ranks[index])", SOURCES),
    Mutation("every block in the same order", MIXED, "default_rng([self.seed, block])",
             "default_rng([self.seed])", SOURCES),
    Mutation("a row's number is its place in the block", MIXED, "int(ranks[index])", "index",
             SOURCES),
    Mutation("passes of whole blocks", MIXED, "[0][:index]", "[0][:0]", SOURCES),
    Mutation("shares cut off, the rest for the first", MIXED, "(quotas[name] - exact[name], name)",
             "name", MIXTURE + "test_shares_follow_the_weights"),
    Mutation("one order of rows for all seeds", MIXED, 'f"{seed}/{name}"', 'name',
             MIXTURE + "test_a_source_more_changes_no_order"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
