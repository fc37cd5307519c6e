"""Edits of the model, its positions, its cache and the sampler that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

KERNELS, MODEL = "qwenlib.kernels.reference", "qwenlib.model.transformer"
CPU, GROUPED = "qwenlib.kernels.cpu", "qwenlib.kernels.grouped"
CONFIG, ACCOUNTING = "qwenlib.model.config", "qwenlib.model.accounting"
ROPE, ROUTER, CHECKPOINT = "qwenlib.model.rope", "qwenlib.model.moe", "qwenlib.model.checkpoint"
SAMPLER, SAMPLING = "qwenlib.generation.sampler", "qwenlib.generation.sampling"
DECODER = "qwenlib.generation.decoder"
ROOM = "tests/model/test_transformer.py::"
VARIANTS = ROOM + "test_variants_equal_transformers"
PADDED = ROOM + "test_padded_rows_equal_transformers_and_the_row_alone"
SPLIT = ROOM + "test_cache_at_random_split_points"
UNEQUAL = ROOM + "test_cache_with_unequal_lengths"
PACKED = ROOM + "test_packed_row_equals_its_documents_alone"
POSITIONS = "tests/model/test_rope.py::"
GENERATION = "tests/generation/test_sampler.py::"
STEPS = "tests/generation/test_decoder.py::"
MOE = "tests/model/test_moe.py::"
EXPERTS = MOE + "test_experts_equal_transformers"
COUNTS = "tests/model/test_accounting.py::test_experts_of_the_released_models"
PROJECT = "project(x_BTD).unflatten"

CASES = [
    Mutation("biases dropped", MODEL, PROJECT, "F.linear(x_BTD, project.weight).unflatten",
             VARIANTS),
    Mutation("key bias dropped", MODEL, PROJECT,
             "F.linear(x_BTD, project.weight, None if project is self.k_proj else project.bias)"
             ".unflatten", VARIANTS),
    Mutation("eps dropped", KERNELS, "return F.rms_norm(x_BTD, gain_D.shape, gain_D, eps)",
             "return F.rms_norm(x_BTD, gain_D.shape, gain_D, 0.0)", VARIANTS),
    Mutation("eps outside the root", KERNELS,
             "return F.rms_norm(x_BTD, gain_D.shape, gain_D, eps)",
             "return gain_D * x_BTD / (x_BTD.square().mean(-1, keepdim=True).sqrt() + eps)",
             VARIANTS),
    Mutation("gain dropped", KERNELS, "return F.rms_norm(x_BTD, gain_D.shape, gain_D, eps)",
             "return F.rms_norm(x_BTD, gain_D.shape, None, eps)", VARIANTS),
    Mutation("gain before the cast", KERNELS,
             "gain_D * F.rms_norm(x_BTD.float(), gain_D.shape, None, eps).to(x_BTD.dtype)",
             "F.rms_norm(x_BTD.float(), gain_D.shape, gain_D.float(), eps).to(x_BTD.dtype)",
             ROOM + "test_norm_equals_transformers"),
    Mutation("kv heads in the wrong order", KERNELS, "    attend = partial(",
             "    k, v = k.flip(1), v.flip(1)\n    attend = partial(",
             ROOM + "test_logits_equal_transformers"),
    Mutation("finished rows grow on", SAMPLER, "if not skipped[i][place]]", "]",
             GENERATION + "test_finished_rows_that_wait_in_the_batch_stay_finished"),
    Mutation("decoding mixes the groups", KERNELS, "q_NHK.reshape(N * G, -1, K)",
             "q_NHK.unflatten(1, (-1, G)).transpose(1, 2).reshape(N * G, -1, K)",
             STEPS + "test_decode_attention_equals_attention"),
    Mutation("rope interleaved", KERNELS, "x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)",
             "torch.stack((x_BTHK[..., 1::2], x_BTHK[..., ::2]), -1).flatten(-2)", VARIANTS),
    Mutation("rope turned the other way", ROPE, "torch.cat((-sin, sin), dim=-1)",
             "torch.cat((sin, -sin), dim=-1)", POSITIONS + "test_rotation_by_hand"),
    Mutation("rope's sign lost", ROPE, "torch.cat((-sin, sin), dim=-1)",
             "torch.cat((sin, sin), dim=-1)", VARIANTS),
    Mutation("no scale", KERNELS, "q, k, v, enable_gqa=not copied)",
             "q, k, v, enable_gqa=not copied, scale=1.0)", VARIANTS),
    Mutation("not causal", KERNELS, "is_causal=q.shape[2] > 1", "is_causal=False",
             ROOM + "test_no_token_sees_the_future"),
    Mutation("gate and up exchanged", KERNELS, "F.silu(gate_BTF) * up_BTF",
             "gate_BTF * F.silu(up_BTF)", VARIANTS),
    Mutation("head not tied", MODEL,
             "            self.lm_head.weight = self.model.embed_tokens.weight\n",
             "            pass\n", VARIANTS),
    Mutation("padding positions not skipped", MODEL,
             "counts_BS = attention_mask_BS.long().cumsum(-1) - 1",
             "counts_BS = torch.arange(attention_mask_BS.shape[1]).expand_as(attention_mask_BS)"
             " * attention_mask_BS", ROOM + "test_positions_start_behind_the_padding"),
    Mutation("padding seen", MODEL,
             "mask_B1TS & attention_mask_BS.bool()[:, None, None, : past + T]",
             "mask_B1TS & (attention_mask_BS >= 0)[:, None, None, : past + T]", PADDED),
    Mutation("mask off by one", MODEL, "columns_S <= columns_S[past:, None]",
             "columns_S < columns_S[past:, None]", PADDED),
    Mutation("position not advanced in decoding", MODEL, "torch.arange(past, past + T, device",
             "torch.arange(0, T, device", SPLIT),
    Mutation("position of a padded row not advanced", MODEL, "[:, past : past + T]", "[:, :T]",
             UNEQUAL),
    Mutation("cache not masked", MODEL,
             "mask_B1TS & attention_mask_BS.bool()[:, None, None, : past + T]",
             "mask_B1TS & (attention_mask_BS.bool()[:, None, None, : past + T]"
             " | (columns_S < past))", UNEQUAL),
    Mutation("cache overwritten", MODEL, "cache.length += T", "cache.length = T", SPLIT),
    Mutation("chunk not causal behind the cache", MODEL, "columns_S <= columns_S[past:, None]",
             "columns_S <= columns_S[-1] + 0 * columns_S[past:, None]", SPLIT),
    Mutation("cached values not reordered", MODEL,
             "self.values = [self._rows_of(tensor, rows) for tensor in self.values]",
             "self.values = [self._rows_of(tensor, torch.arange(len(rows))) for tensor in"
             " self.values]",
             ROOM + "test_reorder_drops_and_repeats_rows"),
    Mutation("documents see each other", MODEL, "(same_BTS & real_BTS)", "real_BTS", PACKED),
    Mutation("packed positions ignored", MODEL, "        if position_ids_BT is None:\n",
             "        if document_ids_BT is not None:\n"
             "            position_ids_BT = torch.arange(T).expand(B, T).roll(1, -1)\n"
             "        if position_ids_BT is None:\n", PACKED),
    Mutation("yarn ramp reversed", ROPE, "frequencies / config.yarn.factor * share + frequencies"
             " * (1 - share)",
             "frequencies / config.yarn.factor * (1 - share) + frequencies * share",
             POSITIONS + "test_golden_values_of_yarn"),
    Mutation("attention factor omitted", ROPE, "mixed, config.yarn.resolved_attention_factor",
             "mixed, 1.0", POSITIONS + "test_golden_values_of_yarn"),
    Mutation("attention factor on cos alone", ROPE, "angles_BTK.sin() * factor",
             "angles_BTK.sin()", VARIANTS),
    Mutation("attention factor twice", ROPE, "mixed, config.yarn.resolved_attention_factor",
             "mixed, config.yarn.resolved_attention_factor**2", VARIANTS),
    Mutation("yarn's slow end lost", ROPE, "dimension(yarn.beta_slow)",
             "dimension(yarn.beta_fast)", POSITIONS + "test_golden_values_of_yarn"),
    Mutation("angles in the model's dtype", ROPE, "position_ids_BT.float()",
             "position_ids_BT.to(dtype)",
             POSITIONS + "test_bf16_tables_are_rounded_after_the_angle"),
    Mutation("the wrong rows leave the cache", SAMPLER, "self.decoder.keep(index)",
             "self.decoder.keep(torch.arange(len(keep)))",
             GENERATION + "test_finished_rows_leave_and_the_others_go_on"),
    Mutation("batch order not undone", SAMPLER, "for prompt in chosen for s in range(samples)",
             "for prompt in range(start, start + len(chosen)) for s in range(samples)",
             GENERATION + "test_greedy_equals_full_passes"),
    Mutation("padding on the right", SAMPLER,
             "real_BT[i, width - len(prompt) :] = 1", "real_BT[i, : len(prompt)] = 1",
             GENERATION + "test_greedy_equals_full_passes"),
    Mutation("padded prompts unmasked in decoding", DECODER,
             "prompts_N1S.masked_fill_(~real_NS.bool()[:, None], -torch.inf)", "pass",
             STEPS + "test_steps_equal_the_full_pass_at_random_split_points"),
    Mutation("columns to come seen", DECODER, "columns_S > self.column", "columns_S < 0",
             STEPS + "test_steps_equal_the_full_pass_at_random_split_points"),
    Mutation("decoding position not advanced", DECODER, "self.positions_N += 1", "pass",
             STEPS + "test_steps_equal_the_full_pass_at_random_split_points"),
    Mutation("decoding bias of q, k, v dropped", DECODER,
             "kernels.linear(h_ND, block.qkv, block.qkv_bias)", "kernels.linear(h_ND, block.qkv)",
             STEPS + "test_steps_equal_the_full_pass_at_random_split_points"),
    Mutation("decoding scale dropped", KERNELS, "q_NHK.reshape(N * G, -1, K) * K**-0.5",
             "q_NHK.reshape(N * G, -1, K)", STEPS + "test_decode_attention_equals_attention"),
    Mutation("positions of rows that left", DECODER,
             "        self.positions_N = self.positions_N[rows]\n",
             "        self.positions_N = self.positions_N[: len(rows)]\n",
             STEPS + "test_rows_leave_and_the_others_go_on"),
    Mutation("parameters moved away from their stack", DECODER, "parameter.data = part",
             "parameter.data = part.clone()",
             STEPS + "test_stacked_parameters_share_memory_and_stay_apart"),
    Mutation("single row doubled and returned twice", CPU, "y_FN[:, :rows].t()", "y_FN.t()",
             STEPS + "test_linear_of_few_rows_equals_the_ordinary_one"),
    Mutation("the random numbers of a row follow its place", SAMPLER, "uniform_NT[numbers]",
             "uniform_NT[: len(numbers)]",
             GENERATION + "test_sampled_rows_do_not_depend_on_their_batch"),
    Mutation("log-probabilities without the temperature", SAMPLER,
             "plain_NV.float() / (sampling.temperature or 1.0)", "plain_NV.float()",
             GENERATION + "test_logprobs_equal_full_passes"),
    Mutation("log-probabilities after the penalty", SAMPLER,
             "sampling, plain_NV = self.sampling, logits_NV\n        if self.seen_NV is not None:\n"
             "            logits_NV = penalise(logits_NV, self.seen_NV, "
             "sampling.repetition_penalty)\n",
             "sampling = self.sampling\n        if self.seen_NV is not None:\n"
             "            logits_NV = penalise(logits_NV, self.seen_NV, "
             "sampling.repetition_penalty)\n        plain_NV = logits_NV\n",
             GENERATION + "test_logprobs_equal_full_passes"),
    Mutation("penalty on the prompt alone", SAMPLER,
             "self.seen_NV.scatter_(1, tokens_N[:, None], True)", "pass",
             GENERATION + "test_penalty_reaches_prompt_and_new_tokens"),
    Mutation("negative logits divided too", SAMPLING, "logits_NV * penalty", "logits_NV / penalty",
             GENERATION + "test_distribution_equals_transformers_processors"),
    Mutation("temperature multiplied", SAMPLING, "/ sampling.temperature",
             "* sampling.temperature", GENERATION + "test_truncation_equals_its_definition"),
    Mutation("top_p counts the token itself", SAMPLING, "before_NC = p_NC.cumsum(-1) - p_NC",
             "before_NC = p_NC.cumsum(-1)", GENERATION + "test_truncation_equals_its_definition"),
    Mutation("top_p keeps its first miss", SAMPLING, "before_NC >= sampling.top_p",
             "before_NC - p_NC >= sampling.top_p",
             GENERATION + "test_truncation_equals_its_definition"),
    Mutation("stop strings sought in one token", SAMPLER,
             "max(len(stop.encode()) for stop in self.stop_strings)", "0",
             GENERATION + "test_stop_strings"),
    Mutation("half characters are shown", SAMPLER, "text := stream.push(token)",
             "text := tokenizer.decode([token])",
             GENERATION + "test_streamed_text_holds_half_characters_back"),
    Mutation("gates renormalised", MODEL, "if self.renormalise:", "if True:", EXPERTS),
    Mutation("softmax over the chosen experts alone", MODEL,
             "router_logits_NE.float().softmax(-1).topk(self.top_k)",
             "router_logits_NE.float().topk(self.top_k)\n"
             "        gates_NC = gates_NC.softmax(-1)", EXPERTS),
    Mutation("shared expert without its gate", MODEL,
             "self.shared_expert(x_ND) * self.shared_expert_gate(x_ND).sigmoid()",
             "self.shared_expert(x_ND)", EXPERTS),
    Mutation("shared gate a softmax", MODEL, "self.shared_expert_gate(x_ND).sigmoid()",
             "self.shared_expert_gate(x_ND).softmax(-1)", EXPERTS),
    Mutation("gates not applied", GROUPED, "y_NCD * gates_NC[..., None]",
             "y_NCD * gates_NC.sum(1)[:, None, None]",
             MOE + "test_grouped_experts_equal_the_loop"),
    Mutation("visits back in the wrong order", GROUPED,
             "torch.empty_like(y_MD).index_copy(0, order_M, y_MD)", "y_MD[order_M]",
             MOE + "test_grouped_experts_equal_the_loop"),
    Mutation("last expert's visits lost", GROUPED, "experts_NC.flatten() <= numbers_E[:, None]",
             "experts_NC.flatten() < numbers_E[:, None]",
             MOE + "test_grouped_experts_equal_the_loop"),
    Mutation("balance without the number of experts", ROUTER, "f_LE.shape[1] * (f_LE * P_LE)",
             "(f_LE * P_LE)", MOE + "test_balance_equals_transformers"),
    Mutation("padding counted in the balance", ROUTER,
             "mask_N.to(p_NE.dtype).flatten()[:, None] / mask_N.sum()",
             "torch.ones_like(mask_N).to(p_NE.dtype).flatten()[:, None] / mask_N.numel()",
             MOE + "test_balance_equals_transformers"),
    Mutation("copies of the FFN not shuffled", ROUTER,
             "torch.randperm(dense_width, generator=generator) for",
             "torch.arange(dense_width) for", MOE + "test_units_are_shuffled_copies"),
    Mutation("gate and up take different units", ROUTER, "torch.cat((gate[units_U], up[units_U]))",
             "torch.cat((gate[units_U], up[units_U.flip(0)]))",
             MOE + "test_upcycling_without_redrawing_keeps_the_dense_function"),
    Mutation("every entry redrawn", ROUTER, "count = round(share * weight.numel())",
             "count = weight.numel() if share else 0",
             MOE + "test_half_of_each_expert_is_redrawn"),
    Mutation("every layer has experts", CONFIG,
             "            and layer not in moe.mlp_only_layers\n",
             "", "tests/model/test_config.py::test_experts_are_read_and_written"),
    Mutation("activated counts idle experts", ACCOUNTING, "return self.total - self.idle",
             "return self.total", COUNTS),
    Mutation("idle counts the chosen experts", ACCOUNTING,
             "(moe.num_experts - moe.num_experts_per_tok)", "moe.num_experts", COUNTS),
    Mutation("router not counted", ACCOUNTING, "sparse * (moe.num_experts + 1) * D", "0", COUNTS),
    Mutation("gate and up exchanged on disk", CHECKPOINT, "gate, up = weight.chunk(2)",
             "up, gate = weight.chunk(2)", MOE + "test_names_on_disk_are_views_of_the_model"),
    Mutation("checkpointing drops the mask", MODEL,
             "checkpoint(block, x_BTD, rope, mask_B1TS, cache, use_reentrant=False)",
             "checkpoint(block, x_BTD, rope, None, cache, use_reentrant=False)",
             ROOM + "test_gradient_checkpointing_changes_memory_alone"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
