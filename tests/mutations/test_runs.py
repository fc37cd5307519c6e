"""Edits of what keeps the record of a run that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

RECORDER, ROWS = "qwenlib.recorder", "tests/test_recorder.py::"
LEFT = "tests/training/test_preemption.py::"
SIGNALS = "qwenlib.batch.signals"
NOTICE = "tests/batch/test_signals.py::test_a_notice_is_passed_on_and_has_an_end"
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
    Mutation("leaves without saving", "qwenlib.training.loop", "due or (leaving and state_dir)",
             "due", LEFT + "test_a_run_that_left_goes_on_bit_for_bit"),
    Mutation("leaves without the other ranks", "qwenlib.training.preemption",
             "self.number = int(number)", "pass", LEFT + "test_a_signal_to_another_rank_counts"),
    Mutation("a signal asked for once only", "qwenlib.training.preemption",
             "return self.number != 0", "number, self.number = self.number, 0\n"
             "        return number != 0", LEFT + "test_a_signal_between_two_steps_is_not_lost"),
    Mutation("each signal brings more time", SIGNALS, "if not self.number:", "if True:", NOTICE),
    Mutation("a notice without an end", SIGNALS, "self.parent.stop(signal.SIGKILL)", "pass",
             NOTICE),
    Mutation("always passed on as SIGTERM", SIGNALS, "self.parent.stop(number)",
             "self.parent.stop(signal.SIGTERM)", NOTICE),
    Mutation("preempted is a failure", "qwenlib.batch.runner",
             'ends & {"interrupted", "preempted"}', 'ends & {"interrupted"}',
             "tests/batch/test_runner.py::test_exit_codes"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
