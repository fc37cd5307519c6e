from collections import Counter

import pytest

from qwenlib.data import mixture
from qwenlib.data.corpora import Document
from qwenlib.data.mixture import draw, interleave, plan, split


def some_documents(files=200, parts=3):
    return [
        Document(f"code/f{i}.py#{k}", f"text {i} {k}", "code", "x", "python")
        for i in range(files)
        for k in range(parts)
    ]


def check_split(function):
    docs = some_documents()
    train, heldout = function(docs, 0.1, seed=0)
    assert not {d.group for d in train} & {d.group for d in heldout}, "a file is on both sides"
    assert sorted([*train, *heldout], key=lambda d: d.id) == sorted(docs, key=lambda d: d.id)
    assert 0.04 < len(heldout) / len(docs) < 0.17
    assert function(docs[::-1], 0.1, seed=0)[1] == heldout[::-1], "a document's side is its own"
    assert function(docs, 0.1, seed=1)[1] != heldout


def test_split_by_file():
    check_split(split)
    with pytest.raises(ValueError, match="heldout_share is 1"):
        split([], 1, 0)


def test_split_by_document_instead_of_file_is_noticed(mutated):
    with pytest.raises(AssertionError, match="both sides"):
        check_split(mutated(mixture, "_uniform(seed, document.group)",
                            "_uniform(seed, document.id)").split)  # fmt: skip


def test_plan_by_hand():
    shares = plan({"code": 600, "prose": 300, "maths": 100}, {"code": 1, "maths": 1}, 400)
    by_name = {s.source: s for s in shares}
    assert by_name["code"].target == by_name["maths"].target == 200
    assert by_name["prose"].target == 0 and by_name["prose"].epochs == 0
    assert by_name["code"].share_before == pytest.approx(0.6)
    assert by_name["code"].epochs == pytest.approx(1 / 3)
    assert by_name["maths"].epochs == pytest.approx(2.0)


def test_plan_refuses_too_many_epochs_and_bad_weights():
    with pytest.raises(ValueError, match="'maths' has 100 tokens.*over 4 epochs"):
        plan({"code": 600, "maths": 100}, {"code": 0.5, "maths": 0.5}, 1000)
    with pytest.raises(ValueError, match="no documents for user"):
        plan({"code": 600}, {"code": 0.5, "user": 0.5}, 100)
    with pytest.raises(ValueError, match="not all zero"):
        plan({"code": 600}, {"code": 0.0}, 100)
    with pytest.raises(ValueError, match="non-negative"):
        plan({"code": 600, "maths": 100}, {"code": 2, "maths": -1}, 100)


def test_draw_samples_down_and_up():
    docs = some_documents(50, 1)
    lengths = [10] * 50
    few = draw(docs, lengths, 95, seed=0)
    assert len(few) == len(set(few)) == 10, "rounded up to a whole document"
    more = draw(docs, lengths, 300, seed=0)
    assert more[:10] == few, "a larger target extends a smaller one"
    twice = Counter(draw(docs, lengths, 750, seed=0))
    assert sorted(twice.values()) == [1] * 25 + [2] * 25
    assert draw(docs, lengths, 0, seed=0) == []
    assert draw(docs, lengths, 95, seed=1) != few
    with pytest.raises(ValueError, match="from no documents"):
        draw([], [], 10, 0)


def test_passes_differ_in_order():
    docs = some_documents(50, 1)
    order = draw(docs, [1] * 50, 100, seed=0)
    assert sorted(order[:50]) == sorted(order[50:]) and order[:50] != order[50:]


def test_a_new_document_moves_no_other():
    docs = some_documents(50, 1)
    before = [docs[i].id for i in draw(docs[1:] + docs[:1], [1] * 50, 50, 0)]
    names = [d.id for d in docs[1:] + docs[:1]]
    with_all = [names[i] for i in draw(docs[1:] + docs[:1], [1] * 50, 50, 0)]
    without = [names[i] for i in draw(docs[1:], [1] * 49, 49, 0)]
    assert [name for name in with_all if name != docs[0].id] == without and before


def test_interleave_keeps_everything_and_follows_the_seed():
    parts = {"b": list(range(50)), "a": list(range(50, 80))}
    merged = interleave(parts, 0)
    assert sorted(merged) == list(range(80)) and merged != list(range(80))
    assert merged == interleave(dict(reversed(parts.items())), 0) != interleave(parts, 1)
