"""Edits of GPT-2's tokenizer and of the views that a guard must notice."""

import pytest

from tests.mutations.harness import Mutation, assert_caught

GPT2, VIEW = "qwenlib.tokenizer.gpt2", "qwenlib.tokenizer.view"
PEER, PAGE = "tests/tokenizer/test_gpt2.py::", "tests/tokenizer/test_view.py::"

CASES = [
    Mutation("GPT-2's digits cut apart", GPT2, r" ?\p{N}+|", r" ?\p{N}|",
             PEER + "test_pieces_by_hand"),
    Mutation("any sign opens a word", GPT2, r" ?\p{L}+|", r"[^\r\n\p{L}\p{N}]?\p{L}+|",
             PEER + "test_pieces_by_hand"),
    Mutation("a space put before the text", GPT2, "add_prefix_space=False",
             "add_prefix_space=True", PEER + "test_ids_equal_tiktoken"),
    Mutation("always GPT-2's pattern", GPT2, "tokenizers.Regex(pattern)",
             "tokenizers.Regex(GPT2_PATTERN)", PEER + "test_another_pattern"),
    Mutation("no row for <|endoftext|>", GPT2,
             "        self._tokens.append(END_OF_TEXT.encode())\n", "",
             PEER + "test_its_control_token_cannot_be_spelled"),
    Mutation("negative ids count from the end", GPT2, "if not 0 <= token_id <", "if not token_id <",
             PEER + "test_its_control_token_cannot_be_spelled"),
    Mutation("control tokens like others", VIEW, "_CONTROL if token_id in control_ids else ", "",
             PAGE + "test_neighbours_differ_in_shade_and_control_tokens_stand_out"),
    Mutation("one shade", VIEW, "[n % 2]\n        title", "[0]\n        title",
             PAGE + "test_neighbours_differ_in_shade_and_control_tokens_stand_out"),
    Mutation("lengths not compared", VIEW, "len(given) != len(ids)", "False",
             PAGE + "test_tooltips_have_ids_and_places"),
    Mutation("ranks from zero", VIEW, "ranks[left, right] + 1", "ranks[left, right]",
             PAGE + "test_merges_one_by_one"),
    Mutation("all words of a long text", VIEW, "in words[:_MOST_WORDS]:", "in words:",
             PAGE + "test_many_words"),
    Mutation("all rows of long words", VIEW, "len(rows) >= _MOST_ROWS", "False",
             PAGE + "test_long_words_stay_out_of_the_table"),
    Mutation("left-out words not counted", VIEW, "_left_out(len(words) - shown, ",
             "_left_out(len(words) - _MOST_WORDS, ",
             PAGE + "test_long_words_stay_out_of_the_table"),
    Mutation("a split character shows as one", VIEW, '"surrogateescape").translate',
             '"replace").translate', PAGE + "test_split_characters_are_bytes_and_whole_ones_text"),
    Mutation("all tokens of a long text", VIEW, "shown = slice(_MOST_TOKENS)",
             "shown = slice(None)", PAGE + "test_static_view_counts_all_and_shows_the_first"),
    Mutation("names not escaped", VIEW, "<b>{html.escape(name)}</b>", "<b>{name}</b>",
             PAGE + "test_names_and_text_are_escaped"),
    Mutation("tokens not escaped", VIEW, "{html.escape(token_text(token))}</span>",
             "{token_text(token)}</span>", PAGE + "test_names_and_text_are_escaped"),
    Mutation("typing changes nothing", VIEW, '    area.observe(update, "value")\n', "",
             PAGE + "test_widget_follows_text_and_choice"),
    Mutation("choosing changes nothing", VIEW, '    choice.observe(update, "value")\n', "",
             PAGE + "test_widget_follows_text_and_choice"),
    Mutation("an error ends the widget", VIEW, "view.value = html.escape(str(error))", "pass",
             PAGE + "test_widget_outlives_half_a_character"),
    Mutation("a widget for everyone", VIEW, "live = _sent_by_front_end() if interactive is None "
             "else interactive", "live = True", PAGE + "test_without_a_front_end_it_is_static"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
