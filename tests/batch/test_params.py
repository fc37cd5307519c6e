"""Typed parameters from -p and YAML, and the refusals."""

import json

import pytest

from qwenlib import stages
from qwenlib.batch import params
from qwenlib.batch.params import Given
from qwenlib.stages import ParameterError, ParameterType


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "3", 3), ("float", "1e-3", 0.001), ("float", "2", 2.0), ("bool", "true", True),
        ("bool", "False", False), ("str", "3", "3"), ("int | None", "none", None),
        ("Optional[int]", "4", 4), ("list[int]", "1,2", [1, 2]),
        ("list[float]", "[1, 2.5]", [1, 2.5]),
    ],
)  # fmt: skip
def test_texts_become_values_of_the_declared_type(kind, text, value):
    found = ParameterType.parse(kind).from_text("x", text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("int", "ten"), ("int", "1.5"), ("bool", "1"), ("float", "x"), ("int", "none")],
)
def test_a_wrong_text_names_parameter_and_type(kind, text):
    with pytest.raises(ParameterError, match=f"'x': expected {kind}, got '{text}'"):
        ParameterType.parse(kind).from_text("x", text)


def test_the_table_comes_from_the_tagged_cell(walk):
    table = params.table("02_second")
    assert list(table)[:2] == ["profile", "seed"] and table["seed"].default == 0
    rate = table["learning_rate"]
    assert str(rate.type) == "float | None" and rate.default is None
    assert rate.help == "size of a step (None: the profile's)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x = 1", "expected `name: type = literal"),
        ("import os", "expected `name: type = literal"),
        ("x: int = 1 + y", "line 1"),
        ("x: int = 1.5", "expected int, got 1.5"),
        ("x: dict = None", "'dict' is not supported"),
    ],
)
def test_a_parameters_cell_holds_typed_literals_only(walk, line, message):
    path = walk.root / "notebooks" / "01_first.ipynb"
    book = json.loads(path.read_text())
    book["cells"][1]["source"] = line
    path.write_text(json.dumps(book))
    with pytest.raises(ParameterError, match=message):
        stages.notebook_parameters(path)


def test_yaml_values_are_typed_and_p_wins(walk):
    path = walk.root / "given.yaml"
    path.write_text("learning_rate: 1e-3\nmax_steps: 5\nseed: 2\n")
    given = Given(params.read_file(path), params.parse_assignments(["max_steps=6"]))
    resolved, typed = params.resolve("02_second", given)
    assert typed == {"learning_rate": 0.001, "max_steps": 6, "seed": 2}
    assert resolved.params["max_steps"] == 6 and resolved.origin["max_steps"] == "given"
    assert resolved.origin["pause"] == "notebook"


def test_the_words_beside_a_value_are_those_of_its_source(walk):
    """A profile's comment tells why it has this value: not that of another, nor of the user's."""
    path = walk.root / "profiles" / "02_second.toml"
    path.write_text(path.read_text().replace("# steps of the loop", "# few", 1))

    def words(**given):
        resolved, _ = params.resolve("02_second", Given(given))
        found = resolved.meanings(params.table("02_second"))
        return found["max_steps"], found["learning_rate"]

    own = "steps (None: the profile's)"
    assert words() == words(profile="smoke") == ("few", "size of a step")
    assert words(profile="small") == ("steps of the loop", "size of a step")
    assert words(max_steps=7) == (own, "size of a step")
    resolved, _ = params.resolve("02_second", Given())
    assert resolved.meanings(params.table("02_second"))["pause"] == "seconds a step takes"
    assert resolved.meanings({})["pause"] == ""


@pytest.mark.parametrize("text", ["max_steps: '5'", "max_steps: 5.0", "max_steps: true", "- a"])
def test_yaml_of_the_wrong_type_is_refused(walk, text):
    path = walk.root / "given.yaml"
    path.write_text(text)
    with pytest.raises(ParameterError, match="max_steps|expected a mapping"):
        params.resolve("02_second", Given(params.read_file(path)))


def test_assignments_are_refused_when_malformed_or_doubled():
    with pytest.raises(ParameterError, match="expected name=value"):
        params.parse_assignments(["seed"])
    with pytest.raises(ParameterError, match="given twice"):
        params.parse_assignments(["seed=1", "seed=2"])


def test_unknown_names_get_the_nearest_known_one(walk):
    given = Given(texts={"lerning_rate": "1"})
    with pytest.raises(ParameterError, match="did you mean 'learning_rate'"):
        params.refuse_unknown(given, ["02_second"])
    with pytest.raises(ParameterError, match="setting of the profiles"):
        params.refuse_unknown(Given(texts={"learning_rate": "1"}), ["01_first"])
    params.refuse_unknown(Given(texts={"pause": "1"}), ["01_first", "02_second"])
