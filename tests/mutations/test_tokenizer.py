"""Edits of encoding, decoding, offsets and chat that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

TOKENIZER, ENCODER = "qwenlib.tokenizer.tokenizer", "qwenlib.tokenizer.encoder"
FORM, STREAM = "qwenlib.tokenizer.normal_form", "qwenlib.tokenizer.stream"
OFFSETS, CHAT, BPE = "qwenlib.tokenizer.offsets", "qwenlib.tokenizer.chat", "qwenlib.tokenizer.bpe"
ROOM = "tests/tokenizer/test_encoder.py::"
DRAWN = ROOM + "test_drawn_text_equals_tokenizers"
CONTROL = ROOM + "test_control_strings"
MARKS = ROOM + "test_younger_marks_are_left_in_place"
PLACES = ROOM + "test_offsets_cut_the_text_into_parts_that_normalise_alone"
BY_HAND = ROOM + "test_offsets_by_hand"
STREAMED = ROOM + "test_streamed_text_is_decoded_text"
CHATS = "tests/tokenizer/test_chat.py::"
BASICS = CHATS + "test_conversation_by_hand_without_fixtures"

CASES = [
    Mutation("no normal form", TOKENIZER, "        normal = normalise(text)\n",
             "        normal = text\n", MARKS),
    Mutation("Python's normal form", FORM, "else _NFC.normalize_str(text)",
             'else unicodedata.normalize("NFC", text)', MARKS),
    Mutation("control strings in plain text", TOKENIZER, "return self._encoder.encode(normal)",
             "return self._full.encode(normal).ids", CONTROL),
    Mutation("normalised before control strings are cut out", TOKENIZER,
             "self._control_pattern.split(text) for text in texts",
             "self._control_pattern.split(normalise(text)) for text in texts",
             ROOM + "test_a_mark_after_a_control_token"),
    Mutation("shortest control token first", TOKENIZER, "key=len, reverse=True", "key=len",
             ROOM + "test_the_longest_control_token_wins"),
    Mutation("flags of added tokens ignored", TOKENIZER,
             "any(token[flag] for token in added for flag in flags)", "False",
             ROOM + "test_flags_of_added_tokens_are_kept"),
    Mutation("a rank file of merges that ranks cannot tell", TOKENIZER,
             "and merges_from_ranks(ranks) == merges", "",
             ROOM + "test_merges_that_ranks_cannot_tell"),
    Mutation("young letters encoded", ENCODER, "or _YOUNG.search(text) is None", "or True",
             ROOM + "test_letters_of_unicode_17"),
    Mutation("digits in runs", BPE, r"\p{L}+|\p{N}", r"\p{L}+|\p{N}+",
             "tests/tokenizer/test_bpe.py::test_pretokens_by_hand"),
    Mutation("control tokens of a batch left out", TOKENIZER,
             "next(encoded) if control is None else [control]",
             "next(encoded) if control is None else []", ROOM + "test_batches_equal_single_texts"),
    Mutation("half characters emitted", STREAM,
             "return self._bytes.decode(self._tokenizer.decode_bytes(kept))",
             'return self._tokenizer.decode_bytes(kept).decode("utf-8", "replace")', STREAMED),
    Mutation("the last bytes swallowed", STREAM, 'self._bytes.decode(b"", final=True)', '""',
             STREAMED),
    Mutation("special tokens streamed", STREAM, "if i not in self._left_out", "", STREAMED),
    Mutation("all control tokens special", TOKENIZER,
             'for token in tokenizer_json["added_tokens"] if token["special"]',
             'for token in tokenizer_json["added_tokens"]', STREAMED),
    Mutation("places not shifted", TOKENIZER, "(at + start, at + end)", "(start, end)", PLACES),
    Mutation("control tokens without width", TOKENIZER, "places = [(0, len(part))]",
             "places = [(0, 0)]", PLACES),
    Mutation("joined characters have their first's place", OFFSETS,
             "places += [(begin, end)] * len(normal)",
             "places += [(begin, begin + 1)] * len(normal)", BY_HAND),
    Mutation("cut before a mark", OFFSETS, "        return False\n", "        return True\n",
             BY_HAND),
    Mutation("cut between characters that compose", OFFSETS,
             "return normalise(before + text[at]) == normalise(before) + normalise(text[at])",
             "return True", ROOM + "test_offsets_of_syllables"),
    Mutation("the end of the token's first byte", OFFSETS, "at_byte[end - 1][1]",
             "at_byte[begin][1]", BY_HAND),
    Mutation("header trained", CHAT, 'Piece("assistant\\n"), *_answer(message)]',
             'Piece("assistant\\n", target=True), *_answer(message)]', BASICS),
    Mutation("end of turn not trained", CHAT, "pieces += _turn_end(target=True)",
             "pieces += _turn_end()", BASICS),
    Mutation("newline after the turn trained", CHAT,
             'return [_control(IM_END, target), Piece("\\n")]',
             'return [_control(IM_END, target), Piece("\\n", target=target)]', BASICS),
    Mutation("tool results trained", CHAT,
             "pieces.append(Piece(f\"\\n<tool_response>\\n{message['content']}"
             '\\n</tool_response>"))',
             "pieces.append(Piece(f\"\\n<tool_response>\\n{message['content']}"
             '\\n</tool_response>", target=True))', BASICS),
    Mutation("tool results in turns of their own", CHAT,
             'if i == 0 or messages[i - 1]["role"] != "tool":', "if True:", BASICS),
    Mutation("no default system", CHAT,
             'system = messages[0]["content"] if has_system else default_system',
             'system = messages[0]["content"] if has_system else ""', BASICS),
    Mutation("calls written as ASCII", CHAT, "ensure_ascii=False", "ensure_ascii=True", BASICS),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
