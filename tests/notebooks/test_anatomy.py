"""Every chapter has the same anatomy, and every solution passes its check."""

import re
from pathlib import Path

import nbformat
import pytest

from qwenlib import stages

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("[0-9]*.ipynb"))
by_stem = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@by_stem
def test_opens_with_title_and_box(path):
    first, second = cells(path, "markdown")[:2]
    number = path.stem.split("_")[0]
    assert first.source.startswith(f"# {number} · "), "the title's number is the file's"
    claim = first.source.split("\n\n")[1].lstrip()
    assert claim.startswith(("> ", "**")), "a claim under the title, quoted or bold"
    box = second.source
    for word in ("You will", "Needs", "tiny", "small", "full"):
        assert word in box, f"the box lacks {word!r}"


@by_stem
def test_one_parameters_cell_of_typed_literals(path):
    tagged = [c for c in cells(path, "code") if "parameters" in tags(c)]
    assert len(tagged) == 1
    lines = tagged[0].source.splitlines()
    names = [line.split(":")[0] for line in lines]
    assert tuple(names[: len(stages.STANDARD)]) == tuple(stages.STANDARD)
    for line in lines:
        assert re.fullmatch(r"\w+: [\w\[\]\"]+ = .+  # .+", line), f"no type or help: {line}"


@by_stem
def test_papermill_lists_the_same_parameters(path):
    from papermill import inspect_notebook

    listed, ours = inspect_notebook(str(path)), stages.notebook_parameters(path)
    assert list(listed) == list(ours)
    for name, parameter in ours.items():
        assert listed[name]["help"] == parameter.help
        kind = str(parameter.type)
        kind = f"Optional[{kind.removesuffix(' | None')}]" if "None" in kind else kind
        assert listed[name]["inferred_type_name"] == kind


@by_stem
def test_sections_every_chapter_has(path):
    text = "\n".join(c.source for c in cells(path, "markdown")).lower()
    for words in ("report versus here", "left out", "exercise", "summary", "next"):
        assert words in text, f"{path.stem} lacks {words!r}"
    code = cells(path, "code")
    assert any("run.compare(" in c.source for c in code)
    assert any("check_exercise" in c.source for c in code)
    assert any("run.check(" in c.source for c in code)
    assert "results" in tags(code[-1]) and "run.finish(" in code[-1].source


@by_stem
def test_check_cells_are_tagged(path):
    for cell in cells(path, "code"):
        if re.search(r"^\s*run\.check\(", cell.source, re.MULTILINE):
            assert "check" in tags(cell), f"untagged check cell:\n{cell.source[:200]}"


@by_stem
def test_prose_and_code_are_balanced(path):
    markdown, code = cells(path, "markdown"), cells(path, "code")
    assert len(markdown) >= 0.5 * len(code)
    longest = max(len(c.source.splitlines()) for c in code)
    assert longest <= 60, f"a cell of {longest} lines"


@by_stem
def test_links_resolve(path):
    text = "\n".join(c.source for c in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.stem} links to {target}"


@by_stem
def test_every_chapter_with_an_exercise_has_a_solution(path):
    assert path.stem in {solution.stem for solution in SOLUTIONS}


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_pass_their_checks(path, capsys):
    """Run the solution's cells in order; a checker that meets a stub says so and fails here."""
    namespace = {"__name__": "__main__"}
    for cell in cells(path, "code"):
        exec(compile(cell.source, f"{path.name}", "exec"), namespace)
    assert "check_exercise" in "".join(c.source for c in cells(path, "code"))
    assert "not solved" not in capsys.readouterr().out.lower()
