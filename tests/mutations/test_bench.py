"""Edits of the benchmark that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

TIMING = "tests/bench/test_timing.py::"
TRAIN = "tests/bench/test_train.py::"
CASES_FILE = "tests/bench/test_cases.py::"
CASES = [
    Mutation("ratio upside down", "qwenlib.bench.timing", "np.array(peer_s) / np.array(ours_s)",
             "np.array(ours_s) / np.array(peer_s)",
             TIMING + "test_ratio_is_above_one_when_ours_is_faster"),
    Mutation("ours always first", "qwenlib.bench.timing", "if i % 2 == 0 else sides[::-1]",
             "if True else sides[::-1]", TIMING + "test_rounds_alternate_who_goes_first"),
    Mutation("warm-up counted", "qwenlib.bench.timing",
             "summarise(ours_s[warmup:], peer_s[warmup:])", "summarise(ours_s, peer_s)",
             TIMING + "test_warm_up_rounds_do_not_count"),
    Mutation("queued work not waited for", "qwenlib.bench.timing",
             "action()\n    wait()", "action()", TIMING + "test_queued_work_is_waited_for"),
    Mutation("tokens compared by length", "qwenlib.bench.cases", "if x != y:", "if False:",
             CASES_FILE + "test_what_differs_is_named"),
    Mutation("any logits accepted", "qwenlib.bench.cases", "if worst <= limit else",
             "if True else", CASES_FILE + "test_what_differs_is_named"),
    Mutation("any losses accepted", "qwenlib.bench.train", "if not abs(a - b) <= limit:",
             "if False:", TRAIN + "test_curves_that_differ_are_named"),
    Mutation("weights trained on", "qwenlib.bench.train", "side.model.load_state_dict(start)",
             "pass", TRAIN + "test_every_call_begins_anew"),
    Mutation("first label counts", "qwenlib.bench.train", "labels_BT[row, start] = IGNORE", "pass",
             TRAIN + "test_rows_hold_documents_without_their_first_label"),
    Mutation("the Trainer decays by its own default", "qwenlib.bench.train",
             "            weight_decay=settings.weight_decay,\n", "",
             TRAIN + "test_both_take_the_same_steps"),
    Mutation("the Trainer's own moments", "qwenlib.bench.train",
             "            adam_beta2=settings.betas[1],\n", "",
             TRAIN + "test_both_take_the_same_steps"),
    Mutation("an earlier peak counts", "qwenlib.bench.memory", 'marks.write_text("5")', "pass",
             TRAIN + "test_peak_is_the_highest_moment_above_the_start"),
    Mutation("twin has weights of its own", "qwenlib.evaluation.verify",
             "tensor.contiguous() for", "tensor.clone() for",
             CASES_FILE + "test_both_sides_share_every_tensor_and_none_is_trivial"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
