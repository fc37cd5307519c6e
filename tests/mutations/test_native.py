"""Edits of the compiled forward pass and of its callers that a guard must notice."""

from pathlib import Path

import pytest

from qwenlib import c_build as build
from qwenlib.kernels import native
from tests.kernels.test_native import needs_compiler
from tests.mutations.harness import Mutation, assert_caught

pytestmark = needs_compiler
NATIVE, DECODER = "qwenlib.kernels.native", "qwenlib.generation.decoder"
ROOM = "tests/kernels/test_native.py::"
TOKENS = ROOM + "test_any_number_of_tokens"
VARIANTS = ROOM + "test_variants_equal_the_full_pass"
STEPS = ROOM + "test_prompts_and_steps_equal_the_full_pass"
SPOILT = ROOM + "test_a_spoilt_parameter_shows"
LARGE = ROOM + "test_large_scores_and_gates"

# (name, text of native.c, its replacement, guard)
C_EDITS = [
    ("eps dropped", "squares / (float)size + eps", "squares / (float)size", TOKENS),
    ("gain dropped", " * inverse * gain[d]", " * inverse", TOKENS),
    ("bias dropped", "l->qkv_bias + from,", "0,", TOKENS),
    ("half a block taken for a whole", "if (columns > BLOCK / 2)", "if (columns > BLOCK)", TOKENS),
    ("rows of the last panel added twice", "for (int r = skip; r < ROWS; r++)\n"
     "                for (int v = 0; v < VECTORS; v++) {",
     "for (int r = 0; r < ROWS; r++)\n                for (int v = 0; v < VECTORS; v++) {",
     VARIANTS),
    ("rope turned the other way", "a * cos[k] + b * sin[k]", "a * cos[k] - b * sin[k]", TOKENS),
    ("position not advanced", "position = s - c->first[c->row[t]]", "position = 0 * s", TOKENS),
    ("padding seen", "* m->columns + first) * K", "* m->columns) * K", VARIANTS),
    ("the token does not see itself", "c->column[t] + 1 - first",
     "c->column[t] + (c->column[t] == first) - first", TOKENS),
    ("kv heads in the wrong order", "h / (H / G)", "h % G", VARIANTS),
    ("values beyond a multiple of four dropped",
     "for (; s < count; s++, value += size) part[0]",
     "for (; s < count - 1; s++, value += size) part[0]", TOKENS),
    ("keys beyond a register not masked", "weights[s] = -__builtin_inff();", "weights[s] = 0;",
     TOKENS),
    ("the largest score not taken off", "exponential(score - top)", "exponential(score)", LARGE),
    ("exponent not clamped from below", "larger(all(-87.0f), x)", "x", LARGE),
    ("clamps hide NaN", "smaller(all(88.0f), larger(all(-87.0f), x))",
     "smaller(larger(x, all(-87.0f)), all(88.0f))", SPOILT),
    ("gate and up exchanged", "gate[r][v] / (1.0f + exponential(-gate[r][v])) * sums[r][v]",
     "sums[r][v] / (1.0f + exponential(-sums[r][v])) * gate[r][v]", TOKENS),
    ("tokens of the other threads left out", "for (int64_t t = thread; t < T; t += threads)",
     "for (int64_t t = 0; t < T; t += threads)", ROOM + "test_threads_change_no_bit"),
    ("wanted tokens in the prompt's order", "c->want[first + i]", "first + i", STEPS),
]  # fmt: skip

CROSS = "tests/kernels/test_cross_entropy.py::"
HEAD = "qwenlib.kernels.cross_entropy"
HITS = CROSS + "test_loss_gradients_and_hits"
HEAD_EDITS = [
    ("gradient without the target", "    scores[target] -= 1;\n", "", HITS),
    ("columns beyond the vocabulary counted", "scores[v] = -INFINITY", "scores[v] = 0", HITS),
    ("the last register's columns not written", "memcpy(row, scores, V * sizeof(float))",
     "memcpy(row, scores, whole * sizeof(float))", HITS),
    ("each equal logit likeliest", "*likeliest = scores[v] < top;", "*likeliest = 1;",
     CROSS + "test_of_equal_logits_the_first_is_likeliest"),
    ("rows of the other threads left out", "m < (part + 1) * M / threads", "m < M / threads / 2",
     HITS),
    ("bf16 cut off instead of rounded", "bits += 0x7fff + ((bits >> 16) & 1);", "",
     CROSS + "test_bf16_gradients_are_rounded_to_the_nearest"),
    ("the last columns in bf16 cut off", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
     "bits >> 16", CROSS + "test_bf16_gradients_are_rounded_to_the_nearest"),
    ("the largest logit not taken off", "exponential(load(scores + v) - top)",
     "exponential(load(scores + v))", CROSS + "test_extreme_logits_stay_finite"),
    ("NaN hidden", "smaller(all(88.0f), larger(all(-87.0f), x))",
     "smaller(larger(x, all(-87.0f)), all(88.0f))", CROSS + "test_nan_shows"),
]  # fmt: skip

CASES = [
    Mutation("scale dropped", NATIVE, "scale=K**-0.5", "scale=1.0", TOKENS),
    Mutation("columns of the prompt's cache in the steps", NATIVE,
             "model.columns = keys[0].shape[2]",
             "model.columns = model.columns or keys[0].shape[2]", STEPS),
    Mutation("gains exchanged", DECODER, "(b.norm_1, b.qkv, b.qkv_bias, b.out, b.norm_2,",
             "(b.norm_2, b.qkv, b.qkv_bias, b.out, b.norm_1,", TOKENS),
    Mutation("every matrix taken", NATIVE, "len(t) >= _ROWS for t", "len(t) >= 1 for t",
             ROOM + "test_only_plain_fp32_parameters"),
    Mutation("transposed matrices taken", NATIVE, " and t.is_contiguous() for t", " for t",
             ROOM + "test_only_plain_fp32_parameters"),
    Mutation("a token just outside the vocabulary", NATIVE, "max(ids) >= model.vocabulary",
             "max(ids) > model.vocabulary", ROOM + "test_tokens_may_lie_apart_and_must_exist"),
    Mutation("a long prompt's memory kept", NATIVE, "<= 8 * sum(sizes)", "<= 1e9 * sum(sizes)",
             ROOM + "test_working_memory"),
    Mutation("head taken for tied", DECODER,
             "model.model.norm.weight, model.lm_head.weight,",
             "model.model.norm.weight, model.model.embed_tokens.weight,", VARIANTS),
    Mutation("the last column of the batch for each prompt", DECODER,
             "last_B = real_BT.sum(1).cumsum(0) - 1",
             "last_B = torch.arange(1, B + 1) * len(row_M) // B - 1", STEPS),
    Mutation("prompts read as not padded", DECODER,
             "T - real_BT.sum(1), last_B", "0 * real_BT.sum(1), last_B", STEPS),
    Mutation("compiled code not used", DECODER, "if forward is not None:\n        decoder =",
             "if False:\n        decoder =", STEPS),
    Mutation("column not advanced", DECODER,
             "        cache.length += 1\n        return self.forward(",
             "        return self.forward(", STEPS),
    Mutation("rows that left keep their padding", DECODER,
             "self.first_N, self.rows_N = self.first_N[rows],",
             "self.first_N, self.rows_N = self.first_N[: len(rows)],", STEPS),
    Mutation("experts taken for a dense model", DECODER,
             "config.moe is not None or not native.can_run(list(model.parameters()),",
             "not native.can_run(list(model.parameters())[:1],",
             ROOM + "test_what_it_cannot_run_goes_through_pytorch"),
]  # fmt: skip


@pytest.mark.parametrize("edit", [*C_EDITS, *HEAD_EDITS], ids=lambda edit: edit[0])
def test_c_turns_red(edit, cache, tmp_path):
    """The edit is in a copy of the C file and its header, to which the module is made to point."""
    name, old, new, guard = edit
    module = NATIVE if edit in C_EDITS else HEAD
    source = Path(native.__file__).with_name(module.split(".")[-1]).with_suffix(".c")
    texts = {p.name: p.read_text(encoding="utf-8") for p in (source, *source.parent.glob("*.h"))}
    found = sum(text.count(old) for text in texts.values())
    assert found == 1, f"mutation {name!r} is stale: update tests/mutations"
    for file, text in texts.items():
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    copy = tmp_path / source.name
    build.library_file(copy)  # raises: an edit that breaks the file proves nothing
    place = 'Path(__file__).with_suffix(".c")'
    assert_caught(Mutation(name, module, place, f"Path({str(copy)!r})", guard))


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
