"""Edits of the scaling fits that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

FIT = "tests/scaling/test_fit.py::"
CASES = [
    Mutation("Huber delta wrong", "qwenlib.scaling.fit", "DELTA = 1e-3", "DELTA = 1.0",
             FIT + "test_bad_runs_do_not_move_the_fit"),
    Mutation("Huber linear part wrong", "qwenlib.scaling.fit", "r - 0.5 * delta", "r - delta",
             FIT + "test_huber_by_hand"),
    Mutation("D from the wrong factor", "qwenlib.scaling.public_runs", "C / (6 * N)",
             "C / (2 * N)", FIT + "test_loader_reads_tokens_from_compute"),
    Mutation("optimiser stopped early", "qwenlib.scaling.fit", "max_iterations: int = 5000",
             "max_iterations: int = 8", FIT + "test_planted_coefficients_come_back_exactly"),
    Mutation("gradient not clipped", "qwenlib.scaling.fit",
             "slope = np.clip(r, -self.delta, self.delta)", "slope = r",
             FIT + "test_gradient_is_that_of_the_objective"),
    Mutation("best loss of all cells", "qwenlib.scaling.fit", "loss[here].min()", "loss.min()",
             FIT + "test_near_optimal_is_relative_to_its_own_cell"),
    Mutation("checkpoints resampled one by one", "qwenlib.scaling.fit",
             "if groups is None else np.asarray(groups)", "if True else np.asarray(groups)",
             FIT + "test_groups_are_resampled_whole"),
    Mutation("priors fixed in the bootstrap", "qwenlib.scaling.fit",
             "shift = prior.sd * rng.standard_normal()", "shift = 0.0",
             FIT + "test_prior_decides_what_the_data_leave_open"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
