"""Edits of the loop, resuming, packing, episodes and pairs that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

LOOP, RESUME = "qwenlib.training.loop", "qwenlib.training.resume"
GRADIENTS, HEAD = "qwenlib.training.gradients", "qwenlib.kernels.cross_entropy"
LOSSES, PACKING = "qwenlib.training.losses", "qwenlib.data.packing"
ROLLOUTS, PREFERENCES = "qwenlib.post_training.rollouts", "qwenlib.post_training.preferences"
TRAINING = "tests/training/"
BAD, BAD_STEPS = TRAINING + "test_bad_steps.py::", "qwenlib.training.bad_steps"
HISTORY = "qwenlib.training.history"
TAKEN_UP = TRAINING + "test_history.py::test_a_run_taken_up_keeps_its_lines_and_cuts_the_rest"
METER, METERED = "qwenlib.training.meter", TRAINING + "test_meter.py::"
AVERAGES, AVERAGED = "qwenlib.training.averages", TRAINING + "test_averages.py::"
MICRO = TRAINING + "test_loop.py::test_micro_batches_equal_one_batch"
GOLDEN = TRAINING + "test_golden.py::test_losses"
WORKERS = TRAINING + "test_gradients.py::test_workers_change_no_bit"
LOGPROBS, ROOM = "qwenlib.kernels.logprobs", "tests/kernels/test_logprobs.py::"
VALUES = ROOM + "test_values_and_gradients"
HITS = "tests/kernels/test_cross_entropy.py::test_loss_gradients_and_hits"
RESUMED = TRAINING + "test_resume.py::test_resumed_run_equals_the_straight_run"
SHARDED = TRAINING + "test_sharding.py::test_parts_of_a_step_are_all_its_rows_once"
LAUNCHED = TRAINING + "test_launch.py::test_"
ALONE = TRAINING + "test_losses.py::test_packed_loss_and_gradients_equal_documents_alone"
FLAT = "tests/post_training/test_rollouts.py::test_flat_groups_left_out_change_nothing"
PAIRS = "tests/post_training/test_preferences.py::"

CASES = [
    Mutation("denominator of one micro-batch", LOOP, "is not None], count)",
             "is not None], count / len(micro_batches))", MICRO),
    Mutation("mean of micro-batch means", GRADIENTS, "loss_sum.backward()",
             "(loss_sum / numbers[1]).backward()", MICRO),
    Mutation("loss of the last micro-batch", GRADIENTS, "total, count = total + loss, count + n",
             "total, count = loss, count + n", MICRO),
    Mutation("gradient of the last worker", GRADIENTS, "old.add_(gradient)", "gradient", WORKERS),
    Mutation("workers compute in fp32", GRADIENTS, "            torch.set_num_threads(share)",
             '            self.autocast = "none"', WORKERS),
    Mutation("one list of router logits for all threads", "qwenlib.model.moe",
             "if threading.get_ident() == caller:", "if True:",
             TRAINING + "test_gradients.py::test_each_thread_records_its_own_router"),
    Mutation("gradient without the target", HEAD, "mass_RV[rows_R, targets_R] -= 1", "pass", HITS),
    Mutation("gradient not scaled", HEAD, "else grad_x_MD * grad_loss", "else grad_x_MD", HITS),
    Mutation("weight's gradient of the last rows", HEAD, "sum_VD[columns] += ",
             "sum_VD[columns] = ", HITS),
    Mutation("weight's gradient of the first columns", HEAD, "range(0, len(sum_VD), _COLUMNS)",
             "range(0, min(len(sum_VD), _COLUMNS), _COLUMNS)", HITS),
    Mutation("temperature forgotten in the logits", LOGPROBS, ".div_(temperature)", "", VALUES),
    Mutation("temperature forgotten in the gradient", LOGPROBS, ".div_(ctx.temperature)", "",
             VALUES),
    Mutation("gradient of the entropy without its mean", LOGPROBS,
             ".add_(entropy_M[part, None])", "", VALUES),
    Mutation("gradient of the log-probability lost beside the entropy's", LOGPROBS,
             "inner_RV.add_(grad_R1)", "inner_RV", VALUES),
    Mutation("one weight for every row", LOGPROBS, "grad_R1 = x_RD.to(ctx.dtype or x_RD.dtype), "
             "grad_logp_M[part, None]", "grad_R1 = x_RD.to(ctx.dtype or x_RD.dtype), "
             "grad_logp_M[part, None].mean().expand(len(x_RD), 1)", VALUES),
    Mutation("gradient of the log-probability without the target", LOGPROBS,
             "grad_RV.scatter_add_(1, targets_M[part, None], grad_R1)", "pass", VALUES),
    Mutation("entropy in bits", LOGPROBS, "entropy_M[part] = log_mass_M[part] - mean_R",
             "entropy_M[part] = (log_mass_M[part] - mean_R) / 0.6931", VALUES),
    Mutation("mass added to the largest logit", LOGPROBS,
             "                z_RV -= top_M[part, None]\n"
             "                z_RV -= log_mass_M[part, None]\n",
             "                z_RV -= top_M[part, None] + log_mass_M[part, None]\n",
             ROOM + "test_large_logits_keep_their_digits"),
    Mutation("impossible tokens are not a number", LOGPROBS, "return log_p_RV.clamp_(min=-1000)",
             "return log_p_RV", ROOM + "test_a_token_that_cannot_come_counts_nothing"),
    Mutation("softmax in bf16", LOGPROBS, "logits_RV.to(_wide(logits_RV.dtype)).div_(temperature)",
             "logits_RV.div_(temperature).to(_wide(logits_RV.dtype))",
             ROOM + "test_bf16_products_fp32_softmax"),
    Mutation("loss of the last rows", HEAD,
             "loss, likeliest = loss + loss_R.sum(), likeliest + likeliest_R.sum()\n    return",
             "loss, likeliest = loss_R.sum(), likeliest + likeliest_R.sum()\n    return", HITS),
    Mutation("no clipping", LOOP, 'config.grad_clip or float("inf")', 'float("inf")',
             TRAINING + "test_loop.py::test_gradient_is_clipped_to_the_norm"),
    Mutation("gradients carried over", LOOP, "    optimizer.zero_grad(set_to_none=True)\n", "",
             GOLDEN),
    Mutation("another eps in the norms", "qwenlib.model.transformer", "self.eps = eps",
             "self.eps = 10 * eps", GOLDEN),
    Mutation("documents of a row see each other", "qwenlib.model.transformer",
             "mask_B1TS & (same_BTS & real_BTS)[:, None]", "mask_B1TS & real_BTS[:, None]",
             GOLDEN),
    Mutation("a bad step moves the weights", LOOP, "if count > 0 and not bad:", "if count > 0:",
             BAD + "test_a_skipped_step_equals_a_step_without_labels"),
    Mutation("spikes raise the median", BAD_STEPS, ' and not row.get("skipped")', "",
             BAD + "test_the_median_is_that_of_good_recent_steps"),
    Mutation("the median of all time", BAD_STEPS, "history[-RECENT:]", "history",
             BAD + "test_the_median_is_that_of_good_recent_steps"),
    Mutation("the gradient's norm is not looked at", BAD_STEPS,
             "if not (math.isfinite(loss) and math.isfinite(norm)):",
             "if not math.isfinite(loss):", BAD + "test_what_is_bad"),
    Mutation("skipping without end", BAD_STEPS, "len(list(skipped)) >= MOST_IN_A_ROW", "False",
             BAD + "test_too_many_bad_steps_in_a_row_stop_the_run"),
    Mutation("wsd falls when it likes", LOOP, "config.min_lr_ratio, config.decay_share,",
             "config.min_lr_ratio,",
             TRAINING + "test_loop.py::test_the_last_part_of_wsd_is_as_long_as_asked"),
    Mutation("seconds of the whole run", METER, "seconds = time.perf_counter() - self.began",
             "seconds = time.perf_counter()", METERED + "test_speed_by_hand"),
    Mutation("utilisation of the forward pass", METER, "length, training=True)", "length)",
             METERED + "test_speed_by_hand"),
    Mutation("bytes of the inputs", METER, "targets_BT = batch.labels_BT[:, 1:]",
             "targets_BT = batch.labels_BT[:, :-1]", METERED + "test_bits_a_byte_are_exact"),
    Mutation("mean of the micro-batches' bits", METER,
             '"text_nats": loss_sum.detach() / least, "text_bytes": size / least',
             '"text_nats": loss_sum.detach() / size, "text_bytes": size / size',
             METERED + "test_bits_a_byte_are_exact"),
    Mutation("control tokens have bytes", METER, "if token not in control:", "if True:",
             METERED + "test_bytes_of_tokens_add_up_to_the_text"),
    Mutation("schedule one step late", LOOP, "            step, config.max_steps, config.learning",
             "            max(step - 1, 0), config.max_steps, config.learning",
             TRAINING + "test_loop.py::test_history_log_and_schedule"),
    Mutation("warm-up from zero", "qwenlib.training.schedule", "peak * (step + 1) / warmup_steps",
             "peak * step / warmup_steps", TRAINING + "test_schedule.py::test_end_points"),
    Mutation("gains decay", "qwenlib.training.optim", '"weight_decay": 0.0}',
             '"weight_decay": weight_decay}',
             TRAINING + "test_loop.py::test_decay_touches_matrices_only"),
    Mutation("generators not restored", RESUME, '    _set_random_state(meta["random"])\n', "",
             RESUMED),
    Mutation("NumPy's generator not restored", RESUME,
             '    np.random.set_state(state["numpy"])\n', "", RESUMED),
    Mutation("step not restored", RESUME, 'return meta["step"], meta["extra"]',
             'return 0, meta["extra"]', RESUMED),
    Mutation("step off by one", RESUME, 'return meta["step"], meta["extra"]',
             'return meta["step"] + 1, meta["extra"]', RESUMED),
    Mutation("moments not saved", RESUME, "    dcp.save(state,",
             '    state["optimizer"] = {\n'
             '        key: torch.zeros_like(value) for key, value in state["optimizer"].items()\n'
             "    }\n    dcp.save(state,", RESUMED),
    Mutation("weights not restored", RESUME, "    dcp.save(state,",
             '    state["model"] = {\n'
             '        key: value + 1e-3 for key, value in state["model"].items()\n'
             "    }\n    dcp.save(state,", RESUMED),
    Mutation("history not restored", LOOP, '"history.jsonl", first,', '"history.jsonl", 0,',
             RESUMED),
    Mutation("steps after the state kept", HISTORY, 'if row["step"] <= step:', "if True:",
             TAKEN_UP),
    Mutation("history of a rewritten file", HISTORY,
             "        if write:\n            self._begin()\n",
             "        if write and not step:\n            self._begin()\n", TAKEN_UP),
    Mutation("updates of the average begin again", LOOP,
             'average.updates = extra["average_updates"]', "pass", RESUMED),
    Mutation("average not restored", RESUME,
             '        state["average"] = average\n    with _quiet():\n        dcp.load(state',
             "        pass\n    with _quiet():\n        dcp.load(state", RESUMED),
    Mutation("the average stays in the model", AVERAGES, "parameter.copy_(value)", "pass",
             AVERAGED + "test_the_model_has_it_inside_and_its_own_weights_after"),
    Mutation("the first weights stay in the average", AVERAGES,
             "min(self.decay, (1 + self.updates) / (10 + self.updates))", "self.decay",
             AVERAGED + "test_by_hand"),
    Mutation("evaluations of the last weights", LOOP,
             "with average.in_place_of(model) if average else nullcontext():", "if True:",
             AVERAGED + "test_evaluations_are_of_the_average_and_training_is_not_changed"),
    Mutation("blocks keep all they need", "qwenlib.training.compute",
             "model.gradient_checkpointing = model.gradient_checkpointing, True",
             "model.gradient_checkpointing = model.gradient_checkpointing, False",
             TRAINING + "test_compute.py::test_checkpointed_blocks_change_no_bit_and_are_let_go"),
    Mutation("every rank takes the first part", "qwenlib.training.sharding",
             "micro_batches[number * count + i]", "micro_batches[i]", SHARDED),
    Mutation("rows of the cut left out", "qwenlib.training.sharding",
             "rows * (number + 1) // ranks)", "rows * number // ranks + rows // ranks)", SHARDED),
    Mutation("answers of other pairs", "qwenlib.post_training.preferences",
             "torch.cat([chosen, pairs + chosen])", "torch.cat([chosen, 1 + chosen])",
             TRAINING + "test_sharding.py::test_parts_of_pairs_have_both_answers"),
    Mutation("the last failure told as the cause", "qwenlib.training.launch",
             "first = min(failed", "first = max(failed",
             LAUNCHED + "the_earliest_failure_is_the_cause"),
    Mutation("every node has as many tasks", "qwenlib.training.launch",
             'here[int(environ["SLURM_NODEID"])]', "here[0]",
             LAUNCHED + "tasks_of_a_slurm_step_are_ranks"),
    Mutation("first label kept", PACKING, "labels_BT[row, start] = IGNORE", "pass", ALONE),
    Mutation("packed positions run on", PACKING, "np.arange(len(ids))",
             "np.arange(start, start + len(ids))",
             "tests/data/test_packing.py::"
             "test_rows_hold_every_document_with_labels_positions_and_ids"),
    Mutation("documents see each other", LOSSES,
             "model.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.document_ids_BT)",
             "model.hidden(batch.input_ids_BT, batch.position_ids_BT)", ALONE),
    Mutation("no shift", LOSSES, "x_BTD[:, :-1][has_target_BT]", "x_BTD[:, 1:][has_target_BT]",
             ALONE),
    Mutation("mean for sum", LOSSES, "return loss_sum, count, {",
             "return loss_sum / count, count, {", ALONE),
    Mutation("held-out mean of means", LOSSES, "total + float(loss_sum), count + int(n)",
             "total + float(loss_sum) / int(n), count + 1",
             TRAINING + "test_losses.py::test_held_out_loss_is_a_mean_over_tokens_not_batches"),
    Mutation("rows left out not counted", ROLLOUTS, "return loss_sum, count + left_out, stats",
             "return loss_sum, count, stats", FLAT),
    Mutation("rows left out counted in each part", ROLLOUTS, "            if k:\n",
             "            if False:\n", FLAT),
    Mutation("the same draw each step", ROLLOUTS, "seed=self.seed * 1_000_003 + step",
             "seed=self.seed * 1_000_003", "tests/post_training/test_rollouts.py::"
             "test_batch_is_a_function_of_weights_and_step"),
    Mutation("pass rate over unusable answers too", PREFERENCES,
             "if sum(answers.scores[j] for j in used) < min_pass_rate * len(used)",
             "if sum(answers.scores[j] for j in used) < min_pass_rate * answers.samples",
             PAIRS + "test_unusable_answers_do_not_exist"),
    Mutation("chosen and rejected exchanged", PREFERENCES,
             "[pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]",
             "[pair.rejected for pair in pairs] + [pair.chosen for pair in pairs]",
             PAIRS + "test_logprobs_equal_each_answer_alone"),
    Mutation("reference rows not transposed", PREFERENCES, "].T.reshape(-1))", "].reshape(-1))",
             PAIRS + "test_batches_are_a_function_of_the_step_with_matching_reference"),
    Mutation("cut answers paired", PREFERENCES, "if answers.finished[j]:", "if True:",
             PAIRS + "test_what_gives_no_pair"),
    Mutation("answers repeated early", PREFERENCES, "(abs(ab[0] - ab[1]), ab)", "ab",
             PAIRS + "test_pairs_use_different_answers_as_long_as_there_are_some"),
    Mutation("any line with an answer", "qwenlib.data.tasks",
             "if not lines or not lines[-1].startswith(ANSWER_PREFIX):",
             "lines = [line for line in lines if line.startswith(ANSWER_PREFIX)]\n"
             "    if not lines:",
             "tests/data/test_tasks.py::test_tricks_score_nothing"),
    Mutation("partial credit", "qwenlib.data.tasks", "(answer, entry) == 1.0)",
             "(answer, entry) > 0)",
             "tests/data/test_tasks.py::test_tricks_score_nothing"),
    Mutation("splits overlap", "qwenlib.data.tasks",
             'wrong_split = is_held_out(question) != (split == "heldout")', "wrong_split = False",
             "tests/data/test_tasks.py::test_splits_are_disjoint_by_text"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
