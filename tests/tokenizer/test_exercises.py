"""The checker of exercise 3: right answers pass, wrong and slow ones do not."""

import heapq
from collections import Counter, defaultdict

import pytest

from qwenlib.tokenizer.exercises import check_exercise_3


def pairs_of(word):
    return list(zip(word, word[1:], strict=False))


def join(word, pair):
    out, i = [], 0
    while i < len(word):
        step = 2 if tuple(word[i : i + 2]) == pair else 1
        out.append(b"".join(word[i : i + step]))
        i += step
    return out


def train(counts, n_merges, tie=lambda pair: pair, overlaps=True, weighted=True):
    """Incremental, with a heap; `tie` orders pairs of one count."""
    words = [[bytes([b]) for b in word] for word in counts]
    times = list(counts.values()) if weighted else [1] * len(counts)
    total, where = Counter(), defaultdict(set)

    def add(w, sign):
        found = pairs_of(words[w])
        for pair in found if overlaps else dict.fromkeys(found):
            total[pair] += sign * times[w]
            where[pair].add(w)

    for w in range(len(words)):
        add(w, 1)
    heap = [(-n, tie(pair), pair) for pair, n in total.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < n_merges:
        n, _, best = heapq.heappop(heap)
        if -n != total[best]:
            continue
        merges.append(best)
        changed = set()
        for w in where.pop(best):
            changed.update(pairs_of(words[w]))
            add(w, -1)
            words[w] = join(words[w], best)
            add(w, 1)
            changed.update(pairs_of(words[w]))
        for pair in changed - {best}:
            heapq.heappush(heap, (-total[pair], tie(pair), pair))
    return merges


def counting_again(counts, n_merges):
    words = {tuple(bytes([b]) for b in word): n for word, n in counts.items()}
    merges = []
    for _ in range(n_merges):
        total = Counter()
        for word, n in words.items():
            for pair in pairs_of(word):
                total[pair] += n
        best = max(total, key=total.get)
        merges.append(best)
        words = {tuple(join(word, best)): n for word, n in words.items()}
    return merges


@pytest.mark.parametrize("tie", [lambda pair: pair, lambda pair: pair[1] + pair[0]])
def test_right_answers_pass_whatever_the_order_of_ties(tie, capsys):
    check_exercise_3(lambda counts, n: train(counts, n, tie))
    assert "correct" in capsys.readouterr().out


def test_a_stub_is_not_solved(capsys):
    check_exercise_3(lambda counts, n_merges: None)
    assert "not solved" in capsys.readouterr().out


def test_wrong_answers_are_refused():
    with pytest.raises(AssertionError, match="overlaps count"):
        check_exercise_3(lambda counts, n: train(counts, n, overlaps=False))
    with pytest.raises(AssertionError, match="counts as often as it occurs"):
        check_exercise_3(lambda counts, n: train(counts, n, weighted=False))
    with pytest.raises(AssertionError, match="1 merges instead of 2"):
        check_exercise_3(lambda counts, n: train(counts, n)[:-1])


def test_counting_everything_again_is_too_slow():
    with pytest.raises(AssertionError, match="right, but"):
        check_exercise_3(counting_again)
