"""The stage graph from the profiles."""

import pytest

from qwenlib.batch import graph
from qwenlib.stages import ParameterError


def test_order_ancestors_columns_and_edges(walk):
    found = graph.chapters()
    assert graph.order(found) == ["01_first", "02_second", "03_other", "04_last"]
    assert graph.ancestors(found, "04_last") == {"01_first", "02_second"}
    assert graph.columns(found) == [["03_other", "01_first"], ["02_second"], ["04_last"]]


def test_edges_that_another_need_includes_are_not_drawn(walk):
    path = walk.root / "profiles" / "04_last.toml"
    text = path.read_text().replace('["02_second"]', '["01_first", "02_second"]')
    path.write_text(text)
    assert graph.direct_needs(graph.chapters(), "04_last") == ["02_second"]


def test_a_cycle_and_a_missing_need_are_named(walk):
    path = walk.root / "profiles" / "01_first.toml"
    text = path.read_text()
    path.write_text(text.replace("needs = []", 'needs = ["04_last"]'))
    with pytest.raises(ParameterError, match="cycle.*01_first -> 04_last -> 02_second -> 01_first"):
        graph.order(graph.chapters())
    path.write_text(text.replace("needs = []", 'needs = ["04_lost"]'))
    with pytest.raises(
        ParameterError, match="01_first.toml needs '04_lost'.*did you mean '04_last'"
    ):
        graph.order(graph.chapters())


@pytest.mark.parametrize("word", ["2", "02", "02_second"])
def test_a_chapter_is_found_by_number_or_name(walk, word):
    assert graph.find(word) == "02_second"


def test_an_unknown_chapter_names_the_nearest(walk):
    with pytest.raises(ParameterError, match="did you mean '02_second'"):
        graph.find("02_secund")


def test_draw_shows_every_stage(walk):
    import matplotlib.pyplot as plt

    fig = graph.draw(graph.chapters(), {"01_first": "done"})
    boxes = [text.get_text() for text in fig.axes[0].texts if text.get_text()]
    assert boxes == ["03\nOther", "01\nFirst", "02\nSecond", "04\nLast"]
    plt.close(fig)
