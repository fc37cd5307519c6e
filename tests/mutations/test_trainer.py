"""Edits of the trainer, its compiled part and the counting that a guard must notice."""

from pathlib import Path

import pytest

from qwenlib import c_build as build
from qwenlib.tokenizer import trainer
from tests.mutations.harness import Mutation, assert_caught
from tests.tokenizer.test_trainer import needs_compiler

TRAINER, PRETOKENS = "qwenlib.tokenizer.trainer", "qwenlib.tokenizer.pretokens"
MERGES, COUNTS = "tests/tokenizer/test_trainer.py::", "tests/tokenizer/test_pretokens.py::"
ANY = MERGES + "test_any_counts"
MANY = MERGES + "test_many_pairs"
CUT = COUNTS + "test_a_cut_changes_no_pretoken"
SUM = COUNTS + "test_any_tables_are_summed"
TOP = COUNTS + "test_max_words_keeps_the_most_frequent"

# (name, text of trainer.c, its replacement, guard)
C_EDITS = [
    ("ties to the largest ids", "a.count > b.count : a.ids < b.ids",
     "a.count > b.count : a.ids > b.ids", ANY),
    ("the rarest pair", "a.count != b.count ? a.count > b.count", "a.count != b.count ? a.count < "
     "b.count", ANY),
    ("fallen counts dropped", "if (count) {\n            top->count = count;", "if (0) {", ANY),
    ("counts of the past", "if (top->count == count) {", "if (count) {", ANY),
    ("a pair in one word only", "(pair->size && pair->words[pair->size - 1] == (uint32_t)word)",
     "pair->size", ANY),
    ("words as frequent as each other", "n = t->frequency[word]", "n = 1", ANY),
    ("the pair of two merges not taken away", "fresh ? right : ids[to - 1], left, -n",
     "ids[to - 1], left, -n", ANY),
    ("the old pair on the right kept", "if (change(t, right, ids[from], -n, word)) return -1;", "",
     ANY),
    ("the new pair on the right not counted",
     "if (change(t, new_id, ids[from], n, word)) return -1;", "", ANY),
    ("the new pair on the left not counted",
     "if (change(t, ids[to - 1], new_id, n, word)) return -1;", "", ANY),
    ("overlapping matches", "fresh = 1;\n            from += 2;",
     "fresh = 1;\n            from += 2 - (left == right && from + 2 < length);", ANY),
    ("the word stays as long", "t->length[word] = to;", "", ANY),
    ("new pairs not in the heap", "return failed || queue(t, known) ? -1 : 0;",
     "return failed ? -1 : 0;", ANY),
    ("the heap's right child never taken",
     "if (child + 1 < t->heap_size && before(t->heap[child + 1], t->heap[child])) child++;", "",
     MANY),
    ("pairs of one slot taken for one", " && t->pairs[t->slots[at] - 1].ids != ids", " && 0", MANY),
    ("pairs lost when the table grows", "for (int64_t i = 0; i < t->size; i++) *slot_of",
     "for (int64_t i = t->size / 2; i < t->size; i++) *slot_of", MANY),
    ("counts of 32 bits", "    pair->count += n;", "    pair->count = (int32_t)(pair->count + n);",
     ANY),
]  # fmt: skip

CASES = [
    Mutation("ties to the largest ids", TRAINER, "heap = [(-n, pair) for pair, n",
             "heap = [(-n, chr(0x10FFFF - ord(pair[0])) + pair[1]) for pair, n", ANY),
    Mutation("a stale count is taken", TRAINER,
             "while heap and -heap[0][0] != pair_count[heap[0][1]]:",
             "while heap and not pair_count[heap[0][1]]:", ANY),
    Mutation("new pairs not indexed", TRAINER, "if new in fresh:", "if new == fresh[0]:", ANY),
    Mutation("words as frequent as each other", TRAINER, "            n = frequency[w]\n",
             "            n = 1\n", ANY),
    Mutation("overlaps counted once", TRAINER,
             "return [word[i : i + 2] for i in range(len(word) - 1)]",
             "return [p for i in range(len(word) - 1) if (p := word[i : i + 2]) != "
             "word[max(0, i - 1) : i + 1] or not i]", ANY),
    Mutation("the least count is too high", TRAINER, "        if pair_count[pair] < min_count:",
             "        if pair_count[pair] <= min_count:", ANY),
    Mutation("the least count is too low", TRAINER, "            if count < min_count:",
             "            if count < min_count - 1:", ANY),
    Mutation("bytes for ids", TRAINER, "bytes(map(BYTE_ORDER.index, range(256)))",
             "bytes(range(256))", MERGES + "test_any_texts"),
    Mutation("cut before white space", PRETOKENS, r'_CUT = r"(?<=\n)(?=\S)|', r'_CUT = r"(?<=\n)|',
             CUT),
    Mutation("cut before any letter", PRETOKENS, r'(?<=\p{L})(?= )"', r'(?=\p{L})"', CUT),
    Mutation("cut after any space", PRETOKENS, r'(?<=\p{L})(?= )"', r'(?<= )(?=\S)"', CUT),
    Mutation("counts of a block lost", PRETOKENS, "list(itertools.islice(items, 4096))",
             "list(itertools.islice(items, 4))[:3]", SUM),
    Mutation("a file taken for its parts", PRETOKENS,
             "yield word, sum(n for _, n in group)", "yield next(group)", SUM),
    Mutation("pre-tokens read from elsewhere", PRETOKENS, "at += length", "at += 1", SUM),
    Mutation("pre-tokens not sorted", PRETOKENS, "for word in sorted(table))", "for word in table)",
             SUM),
    Mutation("any of the equally rare", PRETOKENS, "if n > least or (n == least and room > 0):",
             "if n >= least:", TOP),
    Mutation("the equally rare all left out", PRETOKENS,
             "if n > least or (n == least and room > 0):", "if n > least:", TOP),
    Mutation("left out words for occurrences", PRETOKENS, "counts.left_out += n\n",
             "counts.left_out += 1\n", TOP),
    Mutation("the last chunk lost", PRETOKENS, "    if pieces:\n        yield _Chunk",
             "    if len(pieces) > 9:\n        yield _Chunk", MERGES + "test_any_texts"),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("edit", C_EDITS, ids=lambda edit: edit[0])
def test_c_turns_red(edit, cache, tmp_path):
    """The edit is in a copy of the C file, to which the module is made to point."""
    name, old, new, guard = edit
    copy = tmp_path / "trainer.c"
    text = Path(trainer._SOURCE).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"mutation {name!r} is stale: update tests/mutations"
    copy.write_text(text.replace(old, new), encoding="utf-8")
    build.library_file(copy)  # raises: an edit that breaks the file proves nothing
    place = 'Path(__file__).with_suffix(".c")'
    assert_caught(Mutation(name, TRAINER, place, f"Path({str(copy)!r})", guard))


@pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
def test_turns_red(mutation):
    assert_caught(mutation)
