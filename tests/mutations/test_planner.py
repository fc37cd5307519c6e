"""Edits of the planner that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

MEMORY, PLANNER, GPUS = "qwenlib.model.memory", "qwenlib.model.planner", "qwenlib.model.gpus"
ROOM = "tests/model/test_planner.py::"
SAVED = ROOM + "test_activations_equal_what_the_model_saves"
FUSED = ROOM + "test_activations_with_kernels_that_keep_only_their_inputs"
PEAK = ROOM + "test_peak_of_a_training_step"
FLOPS = ROOM + "test_flops_equal_torchs_count"
ZERO = ROOM + "test_states_shrink_as_in_the_zero_paper"
DECODE = ROOM + "test_decoding_7b_by_hand"

CASES = [
    Mutation("silu forgotten", MEMORY, '"silu": 0 if lean else e * F', '"silu": 0', SAVED),
    Mutation("product forgotten", MEMORY, '"product": e * F', '"product": 0', FUSED),
    Mutation("keys of all query heads", MEMORY, "kv = config.num_key_value_heads *",
             "kv = config.num_attention_heads *", FUSED),
    Mutation("flash attention's numbers in bf16", MEMORY, "e * q + 4 * config.num_attention_heads",
             "e * q + e * config.num_attention_heads", SAVED),
    Mutation("fp32 copy of the norm forgotten", MEMORY, "(0 if lean else 4 * D)", "0", SAVED),
    Mutation("experts kept once a token", MEMORY, '"expert gate, up": 2 * e * C * U',
             '"expert gate, up": 2 * e * U', SAVED),
    Mutation("selective keeps the products' inputs", MEMORY, '("normed", "normed middle",',
             '("normed",', ROOM + "test_selective_checkpointing_equals_torchs"),
    Mutation("full keeps nothing", MEMORY, 'return {"block input": e * D}', "return {}",
             ROOM + "test_full_checkpointing_equals_what_the_model_saves"),
    Mutation("recomputed block not counted", MEMORY,
             "sum(whole.values()) - part + gradients", "gradients", PEAK),
    Mutation("logits counted once", MEMORY, "LOGIT_BYTES = 12", "LOGIT_BYTES = 4", PEAK),
    Mutation("logits and working together", MEMORY, " - min(self.logits, self.working)", "", PEAK),
    Mutation("AdamW's first moment alone", MEMORY, '"fp32": Recipe(4, 4, 0, 8, 4, 0.5)',
             '"fp32": Recipe(4, 4, 0, 4, 4, 0.5)', ROOM + "test_moments_equal_those_of_adamw"),
    Mutation("no fp32 masters", MEMORY, '"mixed": Recipe(2, 2, 4, 8, 2, 1.0)',
             '"mixed": Recipe(2, 2, 0, 8, 2, 1.0)', ZERO),
    Mutation("zero1 shares nothing", PLANNER, 's.sharding == "none" else s.replicas',
             's.sharding != "fsdp" else s.replicas', ZERO),
    Mutation("fsdp keeps gradients whole", PLANNER, "N * recipe.gradients / weight_ranks",
             "N * recipe.gradients", ZERO),
    Mutation("prefetched block forgotten", PLANNER, "(2 * block + tables)", "(block + tables)",
             ROOM + "test_gathered_weights_and_gradients_of_fsdp"),
    Mutation("recomputation is free", PLANNER, "executed += forward - ", "executed += 0 * ", FLOPS),
    Mutation("the head runs twice", PLANNER, "2 * D * (V + dense", "2 * D * (0 * V + dense", FLOPS),
    Mutation("MFU counts recomputation", PLANNER,
             "self.settings.utilisation * self.model_flops / self.executed_flops",
             "self.settings.utilisation", ROOM + "test_time_and_money_by_hand"),
    Mutation("hours times GPUs twice", PLANNER, "self.gpu_hours / self.settings.gpus / 24",
             "self.gpu_hours / 24", ROOM + "test_time_and_money_by_hand"),
    Mutation("the embedding is read whole", PLANNER,
             "0 if config.tie_word_embeddings else count.embedding", "0", DECODE),
    Mutation("cache not read", PLANNER, "s.batch * keys * kv_bytes_per_token(config)\n",
             "0 * keys\n", DECODE),
    Mutation("bound by the faster", PLANNER, "max(step, key=step.get)", "min(step, key=step.get)",
             DECODE),
    Mutation("each row has experts of its own", PLANNER,
             "count.idle * (1 - share) ** (batch - 1)", "count.idle * (1 - share * (batch - 1))",
             ROOM + "test_experts_read_equal_a_simulation"),
    Mutation("a head product for every token", PLANNER, "s.prompt_length) - head) + head",
             "s.prompt_length))", ROOM + "test_prefill_by_hand"),
    Mutation("one row too many", PLANNER, "range(1, 2**30)", "range(0, 2**30)",
             ROOM + "test_the_largest_batch_fits_and_one_more_does_not"),
    Mutation("FLOP/s with sparsity", GPUS, "80e9, 989.4e12, 3.35e12", "80e9, 1979e12, 3.35e12",
             ROOM + "test_llama_3_step_time_is_the_published_one"),
    Mutation("half the bandwidth", GPUS, "80e9, 312e12, 2.039e12",
             "80e9, 312e12, 1.1e12", ROOM + "test_decode_speed_against_the_published_measurement"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
