"""Edits of the GGUF readers and of the chat template's use that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

MODEL, FILE = "qwenlib.model.gguf", "qwenlib.model.gguf_file"
READER, TOKENIZER = "qwenlib.tokenizer.gguf", "qwenlib.tokenizer.tokenizer"
CHAT = "qwenlib.tokenizer.chat"
WEIGHTS = "tests/model/test_gguf.py::"
EQUAL = WEIGHTS + "test_equal_to_transformers"
KEYS = WEIGHTS + "test_metadata_that_are_not_understood"
VOCABULARY = "tests/tokenizer/test_gguf.py::"

CASES = [
    Mutation("rows of q and k left interleaved", MODEL, "if is_llama and part in heads",
             "if not is_llama and part in heads", EQUAL),
    Mutation("k has the heads of q", MODEL, '"attn_k": config.num_key_value_heads',
             '"attn_k": config.num_attention_heads', EQUAL),
    Mutation("rows permuted once more", MODEL, "unflatten(0, (heads, -1, 2))",
             "unflatten(0, (heads, 2, -1))", EQUAL),
    Mutation("biases left interleaved", MODEL, "if is_llama and part in heads",
             'if is_llama and part in heads and name.endswith("weight")',
             WEIGHTS + "test_llama_with_biases"),
    Mutation("gate and up exchanged", MODEL, '"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"',
             '"ffn_up": "mlp.gate_proj", "ffn_gate": "mlp.up_proj"', EQUAL),
    Mutation("the last piece of a tensor left out", MODEL, "range(0, len(rows), step)",
             "range(0, max(1, len(rows) - step), step)",
             WEIGHTS + "test_blocks_equal_another_implementation"),
    Mutation("unknown keys ignored", MODEL, "    get.refuse_unread()\n", "", KEYS),
    Mutation("partial rotation accepted", MODEL, 'get.expect("rope.dimension_count", head_dim)',
             "pass", KEYS),
    Mutation("linear scaling ignored", MODEL, 'if kind != "yarn":', 'if kind == "linear":\n'
             '        return None\n    if kind != "yarn":', KEYS),
    Mutation("a bare factor ignored", MODEL, "if factor not in (0.0, 1.0):", "if False:", KEYS),
    Mutation("RoPE base of Qwen by default", MODEL, "float, 10_000.0)", "float, 1_000_000.0)",
             WEIGHTS + "test_defaults_and_wide_heads"),
    Mutation("eps as it rounds", MODEL, "float(str(np.float32(value)))", "float(value)",
             WEIGHTS + "test_defaults_and_wide_heads"),
    Mutation("YaRN's own factor lost", MODEL, "scale * (0.1 * math.log(factor) + 1.0)", "scale",
             WEIGHTS + "test_yarn_keys"),
    Mutation("YaRN from a fixed length", MODEL,
             '"rope.scaling.original_context_length", int, get("context_length", int)',
             '"rope.scaling.original_context_length", int, 32_768', WEIGHTS + "test_yarn_keys"),
    Mutation("missing biases of qwen2 accepted", MODEL, '(is_llama and name.endswith(".bias"))',
             'name.endswith(".bias")', WEIGHTS + "test_wrong_tensors_are_named"),
    Mutation("cut data not noticed", FILE,
             "self.check(tensor.start + math.prod(shape[:-1]) * tensor.row_bytes)", "pass",
             WEIGHTS + "test_cut_anywhere_is_named"),
    Mutation("data not aligned", FILE, "-(-self.at // alignment) * alignment", "self.at", EQUAL),
    Mutation("digits stay together", READER, "individual_digits=True", "individual_digits=False",
             VOCABULARY + "test_ids_by_hand"),
    Mutation("digits split after the spaces", READER, "[digits, _gpt2_pipeline()[1]]",
             "[_gpt2_pipeline()[1], digits]", VOCABULARY + "test_ids_by_hand"),
    Mutation("NFC for everyone", READER, "return None, pre_tokenizers.Sequence",
             "return qwen_pipeline()[0], pre_tokenizers.Sequence",
             VOCABULARY + "test_ids_by_hand"),
    Mutation("all of <|...|> is special", READER,
             "released.get(token, types[ids[token]] == TokenType.CONTROL)",
             "types[ids[token]] == TokenType.CONTROL",
             VOCABULARY + "test_qwen_file_gives_the_same_tokenizer"),
    Mutation("a start token not added", READER, '("ggml.add_", "ggml.remove_")',
             '("ggml.remove_",)', VOCABULARY + "test_bad_metadata_are_named"),
    Mutation("the file's end token ignored", READER, "ggml.eos_token_id", "ggml.eot_token_id",
             VOCABULARY + "test_layout_with_control_tokens_first"),
    Mutation("Qwen's padding for everyone", TOKENIZER, "self.control[pad_token]",
             "self.control[END_OF_TEXT]", VOCABULARY + "test_layout_with_control_tokens_first"),
    Mutation("base releases end turns with <|endoftext|>", TOKENIZER,
             "        if eos_token == END_OF_TEXT:\n", "        if False:\n",
             VOCABULARY + "test_qwen_file_gives_the_same_tokenizer"),
    Mutation("Qwen's system text for everyone", CHAT, "tools, tokenizer.default_system)",
             "tools, DEFAULT_SYSTEM)", VOCABULARY + "test_default_system_is_used"),
    Mutation("an empty turn for no system text", CHAT, "if system is not None or tools:",
             "if True:", VOCABULARY + "test_no_system_turn"),
    Mutation("unknown control strings encoded apart", CHAT,
             "_join([Piece(p.text, control, p.target) for p, control in zip(pieces, known)])",
             "[Piece(p.text, control, p.target) for p, control in zip(pieces, known)]",
             VOCABULARY + "test_control_strings_the_vocabulary_lacks_are_text"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
