"""A model named by a parameter: which needs it stands in for, and what makes its stage stale."""

import os

import pytest

from qwenlib import notebook, stages
from qwenlib.batch import params, runner
from qwenlib.batch.params import Given
from qwenlib.stages import MissingInput, ParameterError
from tests.batch import conftest
from tests.batch.test_runner import finish_by_hand, names, texts

TABLE = """
[base_model]
replaces = {replaces}
compares = {compares}
suggested = {{learning_rate = 1e-3, max_steps = 2}}

[resources]
"""


def give(walk, name, needs, replaces, compares="[]"):
    """Let a chapter of the temporary walk take `base_model`."""
    path = walk.root / "profiles" / f"{name}.toml"
    text = path.read_text().replace("[resources]\n", TABLE.format(**locals()))
    lines = [f"needs = {needs}" if s.startswith("needs") else s for s in text.splitlines()]
    path.write_text("\n".join(lines))
    knob = "base_model: str | None = None  # start here instead\n"
    if not conftest.KNOBS[name].startswith(knob):
        conftest.KNOBS[name] = knob + conftest.KNOBS[name]
    walk.write(name, conftest.BODY[name])


@pytest.fixture
def chapters(walk, monkeypatch):
    monkeypatch.setattr(conftest, "KNOBS", dict(conftest.KNOBS))
    give(walk, "02_second", '["01_first"]', '["01_first"]')
    give(walk, "04_last", '["02_second", "03_other"]', '["02_second"]', '["02_second"]')
    return walk


FOLLOWS = """
[merge_base]
replaces = ["01_first"]
follows = "02_second"

[resources]
"""


@pytest.fixture
def merging(chapters):
    """04_last reads 02_second and the model before it: 01_first's, or what 02 began from."""
    path = chapters.root / "profiles" / "04_last.toml"
    text = path.read_text().replace("\n[resources]\n", FOLLOWS)
    text = text.replace('["02_second", "03_other"]', '["01_first", "02_second"]')
    text = text.replace('compares = ["02_second"]', "compares = []")
    text = text.replace('replaces = ["02_second"]', 'replaces = ["01_first", "02_second"]')
    path.write_text(text)
    conftest.KNOBS["04_last"] += "merge_base: str | None = None  # the model before\n"
    chapters.write("04_last", conftest.BODY["04_last"])
    return chapters


def finish_from(walk, base):
    """02_second as finished after it began from `base`."""
    finish_by_hand(walk, "02_second")
    path = walk.runs / "default" / "02_second" / "results.json"
    stages.write_json(path, stages.read_json(path) | {"parameters": {"base_model": base}})


def inputs(name, walk, **values):
    resolved, _ = params.resolve(name, texts(**values))
    return stages.fingerprint(resolved, walk.runs / "default")[1]["inputs"]


def test_what_the_model_stands_in_for_is_not_built(chapters):
    assert names(runner.make_plan("2", Given())) == ["01_first", "02_second"]
    assert names(runner.make_plan("2", texts(base_model="some/model"))) == ["02_second"]
    assert names(runner.make_plan("4", texts(base_model="some/model"))) == ["03_other", "04_last"]
    rows = runner.dry_run(runner.make_plan("all", texts(base_model="some/model")))
    assert "run (not run yet)" in [action for step, action, _ in rows if step.name == "02_second"]


def test_a_finished_stage_stands_beside_it_where_the_profile_says_so(chapters):
    finish_by_hand(chapters, "03_other")
    before = set(inputs("04_last", chapters, base_model="some/model"))
    finish_by_hand(chapters, "01_first")
    finish_by_hand(chapters, "02_second")
    after = set(inputs("04_last", chapters, base_model="some/model"))
    assert before == {"03_other", "base_model"} and after - before == {"02_second"}
    assert set(inputs("04_last", chapters)) == {"02_second", "03_other"}
    assert set(inputs("02_second", chapters, base_model="some/model")) == {"base_model"}


def test_the_source_and_its_files_make_the_stage_stale(chapters):
    folder = chapters.root / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")

    def record(source):
        return inputs("02_second", chapters, base_model=source)["base_model"]

    one = record("mine")
    assert record("mine") == record(str(folder)) == one
    os.utime(folder / "model.safetensors", ns=(1, 1))
    other = record("mine")
    (folder / "model.safetensors").write_text("longer weights")
    assert len({str(one), str(other), str(record("mine"))}) == 3
    assert record("some/model") == record("some/model")

    def state(**values):
        plan = runner.make_plan("2", texts(**values))
        return runner.state(plan, plan.steps[-1])

    finish_by_hand(chapters, "01_first")
    finish_by_hand(chapters, "02_second")
    assert state() == (True, "unchanged")
    assert state(base_model="mine") == (False, "changed: inputs, base_model")


def start(chapters, name="02_second", **changes):
    found = stages.notebook_parameters(chapters.root / "notebooks" / f"{name}.ipynb")
    namespace = {key: p.default for key, p in found.items()} | {"missing_input": "stop"} | changes
    namespace["__annotations__"] = {key: str(p.type) for key, p in found.items()}
    return notebook.start(name, namespace)


def test_model_from_gives_the_named_model_or_the_stages(chapters, capsys):
    with pytest.raises(MissingInput, match="02_second needs 01_first"):
        start(chapters)
    run = start(chapters, base_model="some/model")
    capsys.readouterr()
    assert run.model_from("01_first") == "some/model" and not run.has_input("01_first")
    out = capsys.readouterr().out
    assert "base_model=some/model stands in for the model of 01_first" in out
    assert (
        "learning_rate=0.5, max_steps=3" in out and "-p learning_rate=0.001 -p max_steps=2" in out
    )
    with pytest.raises(MissingInput, match="does not read 01_first when base_model is given"):
        run.input("01_first")
    start(chapters, base_model="some/model", learning_rate=0.5, max_steps=1).model_from("01_first")
    assert "begin with" not in capsys.readouterr().out, "what the user chose is not commented on"
    (chapters.root / "mine").mkdir()
    run = start(chapters, base_model="mine")
    assert run.model_from("01_first") == str(chapters.root / "mine")
    finish_by_hand(chapters, "01_first")
    run = start(chapters)
    assert run.model_from("01_first") == chapters.runs / "default" / "01_first" / "model"


def test_bounds_of_the_walks_own_models_do_not_bind(chapters, capsys):
    run = start(chapters, base_model="some/model")
    run.check("good", False, "0 %", quality=True)
    assert "not enforced under base_model" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        run.check("right", False, "wrong")


def test_the_model_that_a_stage_began_from_is_taken_from_its_record(merging):
    def resolved(**values):
        found, _ = params.resolve("04_last", texts(**values))
        return found.params["merge_base"], found.origin["merge_base"]

    assert resolved() == (None, "notebook")
    finish_by_hand(merging, "01_first")
    finish_from(merging, None)
    assert resolved() == (None, "notebook")
    assert set(inputs("04_last", merging)) == {"01_first", "02_second"}
    finish_from(merging, "some/model")
    assert resolved() == ("some/model", "stage 02_second")
    assert resolved(merge_base="other/model") == ("other/model", "given")
    assert resolved(base_model="other/model") == (None, "notebook"), "02_second is not read"
    assert set(inputs("04_last", merging)) == {"02_second", "merge_base"}
    (merging.runs / "default" / "01_first" / "results.json").unlink()
    assert names(runner.make_plan("4", Given())) == ["04_last"], "01_first is not built for it"
    run = start(merging, "04_last")
    assert run.model_from("01_first", "merge_base") == "some/model"
    assert run.params.merge_base == "some/model" and not run.has_input("01_first")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("compares = []", "repalces = []", r"\[base_model\] has unknown keys: \['repalces'\]"),
        ('replaces = ["01_first"]', 'replaces = ["03_other"]', "names .*03_other.* not among the"),
        ("compares = []", 'follows = "03_other"', "names .*03_other.* not among the"),
        ("learning_rate = 1e-3", "rate = 1e-3", r"suggests \['rate'\], which \[tiny\] lacks"),
        ("[base_model]", "[merge_base]", "02_second.toml lacks a table for .*'base_model'"),
    ],
)
def test_a_wrong_table_is_named(chapters, old, new, message):
    path = chapters.root / "profiles" / "02_second.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ParameterError, match=message):
        params.resolve("02_second", Given())
