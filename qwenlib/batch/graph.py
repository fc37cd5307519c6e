"""The stage graph: which chapter needs which, read from the profiles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qwenlib import plotting, stages
from qwenlib.stages import ParameterError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUS_COLOURS = {
    "done": "#009E73", "failed": "#D55E00", "running": "#E69F00", "blocked": "#8A8A8A",
    "interrupted": "#E69F00", "preempted": "#E69F00", "missing": "#B8C0C8",
}  # fmt: skip


def chapters() -> dict[str, stages.Chapter]:
    """All chapters that have a profile and a notebook, in reading order."""
    return {
        name: stages.load_chapter(name)
        for name in stages.chapter_names()
        if stages.find_notebook(name)
    }


def find(word: str, names: Iterable[str] | None = None) -> str:
    """The chapter meant by `8`, `08` or `08_sft`; raises ParameterError otherwise."""
    names = list(chapters() if names is None else names)
    for name in names:
        if word == name or (word.isdigit() and int(word) == int(name[:2])):
            return name
    raise ParameterError(f"no chapter {word!r}{stages.nearest(word, names)}")


def order(graph: Mapping[str, stages.Chapter]) -> list[str]:
    """Stages so that each comes after what it needs; raises ParameterError for a cycle or gap."""
    done: list[str] = []
    open_: list[str] = []

    def visit(name: str, asked_by: str) -> None:
        if name in done:
            return
        if name not in graph:
            raise ParameterError(
                f"{asked_by}.toml needs {name!r}, which has no notebook or no profile"
                + stages.nearest(name, graph)
            )
        if name in open_:
            raise ParameterError("cycle in the needs: " + " -> ".join([*open_, name]))
        open_.append(name)
        for need in graph[name].needs:
            visit(need, name)
        open_.pop()
        done.append(name)

    for name in graph:
        visit(name, name)
    return done


def ancestors(graph: Mapping[str, stages.Chapter], name: str) -> set[str]:
    """Every stage that `name` needs, directly or not."""
    found: set[str] = set()
    todo = list(graph[name].needs)
    while todo:
        need = todo.pop()
        if need not in found:
            found.add(need)
            todo += graph[need].needs if need in graph else ()
    return found


def direct_needs(graph: Mapping[str, stages.Chapter], name: str) -> list[str]:
    """Needs of `name` that no other need of it already includes (the edges worth drawing)."""
    needs = graph[name].needs
    return [
        need
        for need in needs
        if not any(need in ancestors(graph, other) for other in needs if other in graph)
    ]


def columns(graph: Mapping[str, stages.Chapter]) -> list[list[str]]:
    """Stages by depth; in a column those that nobody needs stand first (above the chain)."""
    depth: dict[str, int] = {}
    for name in order(graph):
        depth[name] = 1 + max((depth[need] for need in graph[name].needs), default=-1)
    needed = {need for chapter in graph.values() for need in chapter.needs}
    return [
        sorted((name for name in graph if depth[name] == level), key=lambda name: name in needed)
        for level in range(1 + max(depth.values(), default=-1))
    ]


def draw(graph: Mapping[str, stages.Chapter], status: Mapping[str, str]) -> Figure:
    """The graph as a matplotlib figure; `status` (see STATUS_COLOURS) colours the boxes."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    levels = columns(graph)
    tallest = max(map(len, levels), default=1)
    fig, ax = plt.subplots(figsize=(1.18 * len(levels) + 0.2, 0.8 * tallest + 0.2))
    wide, high = 0.78, 0.66  # of a box, where columns and rows are 1 apart
    place = {
        name: (x, len(level) - 1 - y)  # columns stand on one line, so the chain is straight
        for x, level in enumerate(levels)
        for y, name in enumerate(level)
    }
    for name, (x, y) in place.items():
        for need in direct_needs(graph, name):
            x0, y0 = place[need]
            ax.annotate(
                "", (x - wide / 2 - 0.02, y), (x0 + wide / 2 + 0.02, y0),
                arrowprops={"arrowstyle": "-|>", "color": plotting.palette[6], "lw": 1.1},
            )  # fmt: skip
        colour = STATUS_COLOURS.get(status.get(name, "missing"), STATUS_COLOURS["missing"])
        box = FancyBboxPatch(
            (x - wide / 2, y - high / 2), wide, high, boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="white", edgecolor=colour, lw=2,
        )  # fmt: skip
        ax.add_patch(box)
        title = textwrap.fill(graph[name].title, 13, max_lines=2, placeholder=" …")
        label = f"{name[:2]}\n{title}"
        ax.text(x, y, label, ha="center", va="center", fontsize=7.5)
    ax.set(xlim=(-0.5, len(levels) - 0.5), ylim=(-0.5, tallest - 0.5))
    ax.axis("off")
    return fig
