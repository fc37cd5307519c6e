"""Edits of what keeps the record of a run that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

RECORDER, ROWS = "qwenlib.recorder", "tests/test_recorder.py::"
RESUMED = ROWS + "test_a_resumed_run_repeats_no_step"

CASES = [
    Mutation("a repeated step twice", RECORDER, 'row["step"] < step]', 'row["step"] <= step]',
             RESUMED),
    Mutation("a resumed series drops the others", RECORDER, "if _series(row) != series or row",
             "if row", RESUMED),
    Mutation("earlier rows lost", RECORDER, '_series(row) != series or row["step"] < step]',
             "_series(row) != series]", RESUMED),
    Mutation("one wandb run for all settings", RECORDER, '{self.directory}:{identity}',
             "{self.directory}", ROWS + "test_the_run_id_follows_folder_and_identity"),
    Mutation("every rank writes", RECORDER, '(os.environ.get("RANK", 0)) == 0', "(0) == 0",
             ROWS + "test_only_rank_0_writes"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
