"""The edits that the tests of SFT, DPO, GRPO and online merging must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught


def mutations(room_file: str, test_file: str, rows: list[tuple[str, str, str, str]]):
    module = f"qwenlib.post_training.{room_file}"
    path = f"tests/post_training/{test_file}.py"
    return [
        Mutation(f"{room_file}: {name}", module, old, new, f"{path}::{test}")
        for name, old, new, test in rows
    ]


SFT = mutations(
    "sft",
    "test_sft",
    [
        (
            "no shift",
            "logits_BTV[:, :-1][mask_BT[:, 1:]]",
            "logits_BTV[:, 1:][mask_BT[:, 1:]]",
            "test_logprobs_equal_a_naive_loop",
        ),
        (
            "first label kept",
            "    labels_BT[..., 0] = IGNORE\n",
            "",
            "test_labels_mark_targets_by_position_and_never_the_first_token",
        ),
        (
            "temperature lost",
            ".float() / temperature",
            ".float()",
            "test_logprobs_equal_a_naive_loop",
        ),
        (
            "bf16 softmax",
            "logits_MV.float() / temperature",
            "logits_MV / temperature",
            "test_bf16_logits_are_scored_in_fp32",
        ),
    ],
)

DPO = mutations(
    "dpo",
    "test_dpo",
    [
        (
            "reference gradient leaks",
            "policy_chosen_B.float() - reference_chosen_B.detach()",
            "policy_chosen_B.float() - reference_chosen_B",
            "test_reference_gets_no_gradient",
        ),
        ("sum for mean", "return loss_B.mean()", "return loss_B.sum()", "test_naive_loop"),
        (
            "reference ignored",
            " - reference_rejected_B.detach().float()",
            "",
            "test_start_is_ln_2_with_gradient_minus_half_beta_over_b",
        ),
        (
            "sign",
            "delta_B = chosen_B - rejected_B",
            "delta_B = rejected_B - chosen_B",
            "test_hand_worked_numbers",
        ),
        (
            "ties lost",
            " + 0.5 * (chosen_B == rejected_B).float()",
            "",
            "test_start_is_ln_2_with_gradient_minus_half_beta_over_b",
        ),
        (
            "smoothing swapped",
            "(1 - label_smoothing) * right_B + label_smoothing * flipped_B",
            "(1 - label_smoothing) * flipped_B + label_smoothing * right_B",
            "test_hand_worked_numbers",
        ),
    ],
) + [
    Mutation(
        "dpo: mean for sum of log-probs",
        "qwenlib.post_training.sft",
        ".masked_scatter(mask_BT, logp_M)",
        ".masked_scatter(mask_BT, logp_M) / mask_BT.sum(-1, keepdim=True)",
        "tests/post_training/test_dpo.py::"
        "test_log_probs_are_summed_over_targets_and_padding_does_not_count",
    ),
    Mutation(
        "dpo: padding counted",
        "qwenlib.post_training.sft",
        "mask_BT = target_mask(labels_BT)\n",
        "mask_BT = labels_BT.clone().fill_(1).bool()\n    mask_BT[:, 0] = False\n"
        "    labels_BT = labels_BT.clamp(min=0)\n",
        "tests/post_training/test_dpo.py::"
        "test_log_probs_are_summed_over_targets_and_padding_does_not_count",
    ),
]

GRPO = mutations(
    "grpo",
    "test_grpo",
    [
        (
            "group of one gives NaN",
            "centred_QG.square().sum(-1, keepdim=True) / (n_Q1 - 1).clamp(min=1)",
            "rewards_QG.var(-1, keepdim=True)",
            "test_an_unscored_completion_gets_zero_and_leaves_the_mean",
        ),
        (
            "ddof 0",
            "/ (n_Q1 - 1).clamp(min=1)\n        advantages_QG = advantages_QG / (variance",
            "/ n_Q1.clamp(min=1)\n        advantages_QG = advantages_QG / (variance",
            "test_advantages_by_hand",
        ),
        (
            "rounding noise divided by eps",
            "return torch.where(high_Q1 > low_Q1, advantages_QG, 0.0)",
            "return advantages_QG",
            "test_a_group_of_one_and_equal_rewards_teach_exactly_nothing",
        ),
        (
            "stop token out of the mask",
            "is_eos_NT.long().cumsum(-1) - is_eos_NT.long() == 0",
            "is_eos_NT.long().cumsum(-1) == 0",
            "test_completion_mask_keeps_the_first_stop_token",
        ),
        (
            "padding counted",
            "loss_N = torch.where(mask_NT, loss_NT, 0.0).sum(-1)",
            "loss_N = loss_NT.sum(-1)",
            "test_padding_counts_nowhere",
        ),
        (
            "mask by product",
            "return torch.where(mask_NT, x_NT.float(), 0.0)\n\n\ndef _token_mean",
            "return x_NT.float() * mask_NT\n\n\ndef _token_mean",
            "test_padding_counts_nowhere",
        ),
        (
            "mean for sum",
            "return loss_N.sum(), tokens, stats",
            "return loss_N.mean(), tokens, stats",
            "test_loss_equals_a_naive_loop",
        ),
        (
            "sequence lengths ignored",
            "(loss_N / mask_NT.sum(-1).clamp(min=1)).sum()",
            "loss_N.sum()",
            "test_loss_equals_a_naive_loop",
        ),
        (
            "maximum for minimum",
            "torch.minimum(ratio_NT",
            "torch.maximum(ratio_NT",
            "test_clipping_by_hand",
        ),
        (
            "one clip for both sides",
            "1 + clip_high)\n    loss_NT",
            "1 + clip_low)\n    loss_NT",
            "test_loss_equals_a_naive_loop",
        ),
        (
            "old log-probs attached",
            "_masked(old_logp_NT, mask_NT).detach()",
            "_masked(old_logp_NT, mask_NT)",
            "test_old_reference_and_advantages_get_no_gradient",
        ),
        (
            "reference gradient leaks",
            "_masked(ref_logp_NT, mask_NT).detach() - logp_NT",
            "_masked(ref_logp_NT, mask_NT) - logp_NT",
            "test_old_reference_and_advantages_get_no_gradient",
        ),
        (
            "kl the wrong way round",
            "d_NT = _masked(ref_logp_NT, mask_NT).detach() - logp_NT",
            "d_NT = logp_NT - _masked(ref_logp_NT, mask_NT).detach()",
            "test_kl_estimators_by_enumeration",
        ),
        (
            "k3+ with the gradient of k3",
            "k2_NT + (k3_NT - k2_NT).detach()",
            "k3_NT",
            "test_kl_estimators_by_enumeration",
        ),
    ],
)

MERGING = mutations(
    "online_merging",
    "test_online_merging",
    [
        (
            "a deeper base goes unnoticed",
            "{**ours, **theirs}",
            "ours",
            "test_a_base_of_another_shape_is_named_with_its_first_tensor",
        ),
        (
            "early return",
            "                    self._update(parameter, group, index)\n",
            "                    self._update(parameter, group, index)\n"
            "                    if self.state[parameter]['step'] % self.every:\n"
            "                        return loss\n",
            "test_k_step_with_alpha_0_p_1_is_plain_adamw",
        ),
        (
            "rescale twice",
            "x / p if rescale",
            "x / p / p if rescale",
            "test_ondare_is_unbiased_over_masks",
        ),
        ("rescale left out", "x / p if rescale else x", "x", "test_ondare_is_unbiased_over_masks"),
        (
            "bf16 masters",
            "if parameter.dtype != torch.float32:",
            "if not parameter.dtype.is_floating_point:",
            "test_bf16_masters_are_refused",
        ),
        (
            "eps before the correction",
            '(state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(eps)',
            '(state["exp_avg_sq"].sqrt() + eps) / (1 - beta2**step) ** 0.5',
            "test_alpha_0_p_1_is_adamw_bit_for_bit",
        ),
        (
            "one mask for both",
            "kept_tau = _drop(tau, p, generator, rescale)",
            "kept_tau = torch.where(kept_delta != 0, tau, 0.0)",
            "test_ondare_masks_of_delta_and_tau_are_independent",
        ),
        (
            "the same mask each step",
            'f"{self.seed}/{index}/{step}"',
            'f"{self.seed}/{index}"',
            "test_masks_follow_seed_parameter_and_step",
        ),
        (
            "dense small tensors",
            "    if keep >= x.numel():",
            "    if keep >= x.numel() or p * x.numel() < 1:",
            "test_onties_keeps_at_least_one_entry_and_tiny_signs",
        ),
        (
            "signs by product",
            "ours.sign() * theirs.sign() < 0",
            "ours * theirs < 0",
            "test_onties_keeps_at_least_one_entry_and_tiny_signs",
        ),
        (
            "sum where signs differ",
            "torch.where(opposed, larger, ours + theirs)",
            "ours + theirs",
            "test_onties_four_elements_by_hand",
        ),
        (
            "no roll back",
            "parameter.copy_(anchor)",
            "parameter.add_(anchor - anchor)",
            "test_k_step_returns_dropped_entries_to_the_window_start",
        ),
        (
            "alpha moves at zero lr",
            "        if lr == 0:\n            return\n",
            "",
            "test_alpha_pulls_along_the_task_vector_and_zero_lr_does_not_move",
        ),
    ],
)

COMPLETIONS = mutations(
    "completions",
    "test_completions",
    [
        (
            "head on the completion's own positions",
            "[:, :-1][mask_NT[:, 1:]]",
            "[:, 1:][mask_NT[:, 1:]]",
            "test_equal_to_those_of_all_logits",
        ),
        (
            "temperature lost in parts",
            "labels_NT[mask_NT], temperature)",
            "labels_NT[mask_NT])",
            "test_equal_to_those_of_all_logits",
        ),
        (
            "rows decide, not logits",
            "len(hidden_MD) * len(weight_VD) <=",
            "len(hidden_MD) <=",
            "test_the_size_decides",
        ),
    ],
)


@pytest.mark.parametrize("mutation", SFT + DPO + GRPO + MERGING + COMPLETIONS, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
