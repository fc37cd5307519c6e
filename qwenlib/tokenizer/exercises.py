"""Checkers of the exercises in chapter 02; they accept any correct answer."""

import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenlib.tokenizer.bpe import Merge, merge_steps
from qwenlib.tokenizer.chat import encode_chat
from qwenlib.tokenizer.tokenizer import Tokenizer
from qwenlib.tokenizer.trainer import count_pretokens, readable_merges

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
    merges = readable_merges(counts, 300)
    ranks = {pair: i for i, pair in enumerate(merges)}
    rng = random.Random(0)
    noise = [bytes(rng.choices(b"shel aore", k=12)) for _ in range(50)]
    for word in [*counts, *noise]:
        got, expected = answer(word, list(merges)), merge_steps(word, ranks)[-1]
        assert got == expected, f"{word!r}: {got}, expected {expected}"
    print("Exercise 1: correct.")


def check_exercise_2(answer: Callable[[Sequence[int], Tokenizer], list[int] | None]) -> None:
    """Check `answer(ids, tokenizer) -> mask`, the target mask read off the ids of a chat."""
    tokenizer = Tokenizer.from_merges(readable_merges(count_pretokens([_TEXT]), 300))
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


def check_exercise_3(answer: Callable[[dict[bytes, int], int], list[Merge] | None]) -> None:
    """Check `answer(counts, n_merges) -> merges`, BPE training; any order among ties is right.

    On 3,000 words it must take less than half the time of counting all pairs every time.
    """
    if answer({b"ab": 1}, 1) is None:
        print("Exercise 3: not solved yet.")
        return
    rng = random.Random(0)
    by_hand = [
        ({b"xy": 1, b"xyz": 1, b"ab": 5}, 2, "a word counts as often as it occurs"),
        ({b"aaaa": 3, b"ab": 5}, 2, "aaaa holds the pair (a, a) three times: overlaps count"),
        ({b"abab": 2, b"ab": 1, b"x": 9}, 2, "after (a, b) comes (ab, ab); x has no pair"),
        ({bytes(rng.choices(b"ab", k=9)): 1 + n % 3 for n in range(40)}, 25, "many ties"),
        (dict(Counter(count_pretokens([_TEXT]))), 40, "an English text"),
    ]
    for counts, n_merges, hint in by_hand:
        _check_merges(answer(dict(counts), n_merges), counts, n_merges, hint)
    counts = _many_words(3_000)
    yours, merges = _seconds(lambda: answer(dict(counts), 80))
    naive, _ = _seconds(lambda: _check_merges(merges, counts, 80, "3,000 different words"))
    if yours >= naive / 2:  # one slow moment of the machine is not the answer's fault
        yours = min(yours, _seconds(lambda: answer(dict(counts), 80))[0])
    assert yours < naive / 2, (
        f"right, but {yours:.2f} s for 3,000 words; counting everything again after each merge "
        f"takes {naive:.2f} s. Hint: keep for every pair the words that hold it"
    )
    print(f"Exercise 3: correct, {naive / yours:.0f} times as fast as counting everything again.")


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """This thread's time for `work()`: other threads and other objects' garbage do not count."""
    collected = gc.isenabled()
    gc.disable()
    try:
        began = time.thread_time()
        result = work()
        return time.thread_time() - began, result
    finally:
        if collected:
            gc.enable()


def _check_merges(
    merges: Sequence[Merge] | None, counts: Mapping[bytes, int], n_merges: int, hint: str
) -> None:
    """Replay `merges`, counting every pair again at each step: each must be a most frequent one."""
    assert merges is not None and len(merges) == n_merges, (
        f"{len(merges or [])} merges instead of {n_merges}: {hint}"
    )
    words = {tuple(bytes([b]) for b in word): n for word, n in counts.items()}
    for step, merge in enumerate(map(tuple, merges)):
        pairs: Counter[Merge] = Counter()
        for parts, n in words.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += n
        best, most = pairs.most_common(1)[0]
        assert pairs[merge] == most, (
            f"merge {step + 1} is {merge}, counted {pairs[merge]} times; {best} is counted {most} "
            f"times: {hint}"
        )
        words = {_joined(parts, merge): n for parts, n in words.items()}


def _joined(parts: tuple[bytes, ...], pair: Merge) -> tuple[bytes, ...]:
    out, i = [], 0
    while i < len(parts):
        both = parts[i : i + 2] == pair
        out.append(parts[i] + parts[i + 1] if both else parts[i])
        i += 2 if both else 1
    return tuple(out)


def _many_words(n: int) -> dict[bytes, int]:
    """Made-up words of frequent syllables, with frequencies that fall as 1 / rank."""
    rng = random.Random(1)
    syllables = [a + b for a in "tsnrlkmd" for b in "aeiou"]
    weights = [1 / (i + 1) for i in range(len(syllables))]
    words: dict[bytes, int] = {}
    while len(words) < n:
        word = " " + "".join(rng.choices(syllables, weights, k=rng.randint(2, 5)))
        words.setdefault(word.encode(), 1 + 20 * n // (len(words) + 1))
    return words
