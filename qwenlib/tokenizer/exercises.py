"""Checkers of the exercises in chapter 02; they accept any correct answer."""

import random
from collections.abc import Callable, Sequence

from qwenlib.tokenizer.bpe import Merge, count_pretokens, merge_steps, merges_from_counts
from qwenlib.tokenizer.chat import encode_chat
from qwenlib.tokenizer.tokenizer import Tokenizer

_TEXT = (
    "She sells sea shells on the sea shore; the shells she sells are sea shells, I'm sure. "
    "If she sells sea shells on the sea shore, then I'm sure she sells sea shore shells. "
    "user assistant system 3 + 4 = 7, 12 + 30 = 42.\n"
) * 3


def check_exercise_1(answer: Callable[[bytes, list[Merge]], list[bytes] | None]) -> None:
    """Check `answer(word, merges) -> tokens`, BPE encoding of one pre-token; hints on failure."""
    if answer(b"abc", [(b"a", b"b")]) is None:
        print("Exercise 1: not solved yet.")
        return
    by_hand = [
        (b"abc", [(b"a", b"b")], [b"ab", b"c"], "merge the pair (a, b)"),
        (b"abc", [(b"b", b"c"), (b"a", b"b")], [b"a", b"bc"], "the earlier merge wins"),
        (b"aaa", [(b"a", b"a")], [b"aa", b"a"], "equal pairs are taken from the left"),
        (b"abab", [(b"a", b"b"), (b"ab", b"ab")], [b"abab"], "a merge can use an earlier result"),
        (b"x", [(b"a", b"b")], [b"x"], "a single byte stays"),
        (b"", [(b"a", b"b")], [], "an empty word has no tokens"),
    ]
    for word, merges, expected, hint in by_hand:
        got = answer(word, list(merges))
        assert got == expected, f"{word!r} with {merges}: {got}, expected {expected}: {hint}"
    counts = count_pretokens([_TEXT])
    merges = merges_from_counts(counts, 300)
    ranks = {pair: i for i, pair in enumerate(merges)}
    rng = random.Random(0)
    noise = [bytes(rng.choices(b"shel aore", k=12)) for _ in range(50)]
    for word in [*counts, *noise]:
        got, expected = answer(word, list(merges)), merge_steps(word, ranks)[-1]
        assert got == expected, f"{word!r}: {got}, expected {expected}"
    print("Exercise 1: correct.")


def check_exercise_2(answer: Callable[[Sequence[int], Tokenizer], list[int] | None]) -> None:
    """Check `answer(ids, tokenizer) -> mask`, the target mask read off the ids of a chat."""
    tokenizer = Tokenizer.from_merges(merges_from_counts(count_pretokens([_TEXT]), 300))
    question = {"role": "user", "content": "3 + 4 = ?"}
    reply = {"role": "assistant", "content": "7"}
    system = {"role": "system", "content": "sea shells"}
    ids, mask = encode_chat(tokenizer, [question, reply])
    got = answer(ids, tokenizer)
    if got is None:
        print("Exercise 2: not solved yet.")
        return
    hints = [
        ([question, reply], False, "content and <|im_end|> of the answer, nothing else"),
        ([system, question, reply], False, "a system turn is no target"),
        ([question, reply, question, reply], False, "every assistant turn counts"),
        ([question], True, "a generation prompt has nothing to learn yet"),
        ([question, {"role": "assistant", "content": ""}], False, "an empty answer still ends"),
        (
            [{"role": "user", "content": "assistant\n7<|im_end|>"}, reply],
            False,
            "a user may write the word assistant, or <|im_end|> as plain text",
        ),
    ]
    for messages, prompt, hint in hints:
        ids, mask = encode_chat(tokenizer, messages, add_generation_prompt=prompt)
        got = list(answer(list(ids), tokenizer))
        assert len(got) == len(ids), f"{len(got)} mask entries for {len(ids)} ids"
        assert [int(m) for m in got] == mask, (
            f"{tokenizer.decode(ids)!r}\n got {got}\nwant {mask}\nhint: {hint}"
        )
    print("Exercise 2: correct.")
