"""Edits of the model, its positions, its cache and the sampler that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

KERNELS, MODEL = "qwenlib.kernels.reference", "qwenlib.model.transformer"
ROPE, SAMPLER = "qwenlib.model.rope", "qwenlib.generation.sampler"
ROOM = "tests/model/test_transformer.py::"
VARIANTS = ROOM + "test_variants_equal_transformers"
PADDED = ROOM + "test_padded_rows_equal_transformers_and_the_row_alone"
SPLIT = ROOM + "test_cache_at_random_split_points"
UNEQUAL = ROOM + "test_cache_with_unequal_lengths"
PACKED = ROOM + "test_packed_row_equals_its_documents_alone"
POSITIONS = "tests/model/test_rope.py::"
GENERATION = "tests/generation/test_sampler.py::"
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
    Mutation("kv heads repeated in the wrong order", KERNELS, "x.repeat_interleave(groups, dim=1)",
             "x.repeat(1, groups, 1, 1)", ROOM + "test_logits_equal_transformers"),
    Mutation("finished rows grow on", SAMPLER,
             "            if done[row]:\n                continue\n", "",
             GENERATION + "test_finished_rows_that_wait_in_the_batch_stay_finished"),
    Mutation("decoding mixes the groups", KERNELS, "q_BTHK.unflatten(2, (-1, groups))[:, 0]",
             "q_BTHK.unflatten(2, (groups, -1))[:, 0].transpose(1, 2)",
             GENERATION + "test_greedy_equals_full_passes"),
    Mutation("rope interleaved", KERNELS,
             "rotated = torch.cat((-second, first), dim=-1)",
             "rotated = torch.stack((-x_BTHK[..., 1::2], x_BTHK[..., ::2]), -1).flatten(-2)",
             VARIANTS),
    Mutation("rope turned the other way", KERNELS, "torch.cat((-second, first), dim=-1)",
             "torch.cat((second, -first), dim=-1)", POSITIONS + "test_rotation_by_hand"),
    Mutation("no scale", KERNELS, "scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)",
             "scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=1.0)",
             VARIANTS),
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
             "self.values = [v[rows] for v in self.values]",
             "self.values = [v[: len(rows)] for v in self.values]",
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
    Mutation("attention factor on cos alone", ROPE, "(angles_BTK.sin() * factor).to(dtype)",
             "angles_BTK.sin().to(dtype)", VARIANTS),
    Mutation("attention factor twice", ROPE, "mixed, config.yarn.resolved_attention_factor",
             "mixed, config.yarn.resolved_attention_factor**2", VARIANTS),
    Mutation("yarn's slow end lost", ROPE, "dimension(yarn.beta_slow)",
             "dimension(yarn.beta_fast)", POSITIONS + "test_golden_values_of_yarn"),
    Mutation("angles in the model's dtype", ROPE, "position_ids_BT.float()",
             "position_ids_BT.to(dtype)",
             POSITIONS + "test_bf16_tables_are_rounded_after_the_angle"),
    Mutation("the wrong rows leave the cache", SAMPLER, "cache.reorder(index)",
             "cache.reorder(torch.arange(len(keep)))",
             GENERATION + "test_finished_rows_leave_and_the_others_go_on"),
    Mutation("batch order not undone", SAMPLER, "completions[prompt * samples + s] =",
             "completions[(start + place) * samples + s] =",
             GENERATION + "test_greedy_equals_full_passes"),
    Mutation("padding on the right", SAMPLER,
             "real_BT[i, width - len(prompt) :] = 1", "real_BT[i, : len(prompt)] = 1",
             GENERATION + "test_greedy_equals_full_passes"),
    Mutation("temperature multiplied", SAMPLER, ".float() / temperature", ".float() * temperature",
             GENERATION + "test_truncation_equals_its_definition"),
    Mutation("top_p counts the token itself", SAMPLER,
             "before_NV = sorted_NV.softmax(-1).cumsum(-1) - sorted_NV.softmax(-1)",
             "before_NV = sorted_NV.softmax(-1).cumsum(-1).where(sorted_NV < sorted_NV[:, :1], "
             "sorted_NV.new_zeros(()))", GENERATION + "test_truncation_equals_its_definition"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
