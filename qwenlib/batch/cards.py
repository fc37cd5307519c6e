"""Check the data cards against the asset registry, the notebooks, the profiles and the files.

A card is `data_cards/<name>.md`: Hugging Face front matter plus our own fields (`name`, `kind`,
`source`, `revision`, `sha256`, `size`, `fields`, `used_in`), then the sections of SECTIONS.
`kind` is `asset` (a file of `qwenlib.assets`), `corpus` (a source of `qwenlib.data.corpora`),
`generated` (made by a chapter) or `hub` (on the Hugging Face hub under the card's `hub_id`).
"""

from __future__ import annotations

import ast
import functools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwenlib import assets

KINDS = ("asset", "corpus", "generated", "hub")
REQUIRED = (
    "name", "kind", "license", "language", "source", "revision", "size", "fields", "used_in",
)  # fmt: skip
SECTIONS = ("How it is made", "Known faults")
_PACKAGE = Path(__file__).resolve().parent.parent
# Calls whose first argument names a data set; the plain words are builders, not names.
_CALLS = {"fetch", "documents", "find_table", "load_dataset"}
_BUILDERS = {"arrow", "csv", "json", "pandas", "parquet", "text"}
_HUB_ID = re.compile(r"(?!runs/)[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Problem:
    """One fault: the card or file it was found in, and what to do."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def check_cards(
    cards_dir: str | Path,
    notebooks_dir: str | Path,
    profiles_dir: str | Path,
    package_dir: str | Path = _PACKAGE,
) -> list[Problem]:
    """Every fault of the cards, sorted by place; an empty list means that all is well.

    Raises FileNotFoundError when one of the folders does not exist.
    """
    cards_dir, notebooks_dir, profiles_dir, package_dir = (
        Path(folder) for folder in (cards_dir, notebooks_dir, profiles_dir, package_dir)
    )
    for folder in (cards_dir, notebooks_dir, profiles_dir, package_dir):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    cards, problems = _load(cards_dir)
    listed = _listed(profiles_dir)
    chapters = {path.stem for path in profiles_dir.glob("[0-9]*.toml")}
    for name, card in cards.items():
        place = f"{cards_dir.name}/{name}.md"
        problems += [Problem(place, text) for text in _faults(name, card, chapters, listed)]
    for name in assets.ASSETS:
        if name not in cards:
            problems.append(Problem(f"asset {name}", f"has no card {cards_dir.name}/{name}.md"))
    for chapter, names in listed.items():
        for name in names:
            place = f"{profiles_dir.name}/{chapter}.toml"
            if name not in cards:
                problems.append(Problem(place, f"lists the card {name!r}, which does not exist"))
            elif chapter not in (cards[name].get("used_in") or ()):
                problems.append(
                    Problem(place, f"lists {name!r}, whose card does not name it under used_in")
                )
    hub_ids = {id for card in cards.values() for id in _hub_ids(card)}
    used, unreadable = _used_by_notebooks(notebooks_dir)
    problems += unreadable
    used += [
        *_used_by_profiles(profiles_dir),
        *_used_by_package(package_dir),
    ]
    for place, name in used:
        if name not in cards and name not in hub_ids:
            problems.append(Problem(place, f"uses {name!r}, which has no card"))
    return sorted(set(problems), key=str)


def _load(cards_dir: Path) -> tuple[dict[str, Mapping[str, Any]], list[Problem]]:
    """Front matter by file name, with the text of the card under the key `body`."""
    cards, problems = {}, []
    for path in sorted(cards_dir.glob("*.md")):
        if path.name == "README.md":
            continue
        match = re.fullmatch(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
        try:
            fields = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError as error:
            fields = None
            problems.append(Problem(f"{cards_dir.name}/{path.name}", f"bad YAML: {error}"))
        if isinstance(fields, dict):
            cards[path.stem] = {**fields, "body": match.group(2)}
        else:
            text = "needs front matter between two lines of ---"
            problems.append(Problem(f"{cards_dir.name}/{path.name}", text))
    return cards, problems


def _hub_ids(card: Mapping[str, Any]) -> list[str]:
    ids = card.get("hub_id") or []
    return [ids] if isinstance(ids, str) else list(ids)


def _faults(
    name: str, card: Mapping[str, Any], chapters: set[str], listed: Mapping[str, list[str]]
) -> Iterator[str]:
    """What is wrong with one card, taken alone and against the thing it describes."""
    for field in REQUIRED:
        # used_in may be an empty list: a registered file that no chapter needs yet.
        empty = (None, "", {}) if field == "used_in" else (None, "", {}, [])
        if card.get(field) in empty:
            yield f"the field {field!r} is missing or empty"
    if card.get("name") not in (None, name):
        yield f"its name is {card['name']!r}; it must be that of the file"
    if card.get("license") == "other" and not card.get("license_name"):
        yield "license is 'other': give license_name"
    for section in SECTIONS:
        found = re.search(rf"^## {section}\n+(?!#)\S", card["body"], re.MULTILINE)
        if not found:
            yield f"the section '## {section}' is missing or empty"
    if card.get("fields") and not isinstance(card["fields"], dict):
        yield "fields must map each field to its meaning"
    for chapter in card.get("used_in") or ():
        if chapters and chapter not in chapters:
            yield f"used_in names {chapter!r}, which is not a chapter"
    kind = card.get("kind")
    if kind == "asset":
        yield from _asset_faults(name, card)
    elif kind == "corpus":
        from qwenlib.data.corpora import SOURCES

        if name not in SOURCES:
            yield f"there is no corpus {name!r} in qwenlib.data.corpora"
    elif kind == "generated":
        if listed and not any(name in names for names in listed.values()):
            yield "no chapter's profile lists it under cards; is there such a set?"
    elif kind == "hub":
        if not _hub_ids(card):
            yield "the field 'hub_id' is missing or empty"
    elif kind is not None:
        yield f"kind {kind!r} is none of {', '.join(KINDS)}"


def _asset_faults(name: str, card: Mapping[str, Any]) -> Iterator[str]:
    asset = assets.ASSETS.get(name)
    if asset is None:
        yield f"there is no asset {name!r} in qwenlib.assets"
        return
    licence = str(card.get("license_name") or card.get("license"))
    if licence.lower() != asset.licence.lower():
        yield f"license is {licence!r}, the registry says {asset.licence!r}"
    if not card.get("sha256"):
        yield "the field 'sha256' is missing or empty"
    elif card["sha256"] != asset.sha256:
        yield f"sha256 is {card['sha256']}, the registry says {asset.sha256}"
    if card.get("size") != asset.size:
        yield f"size is {card.get('size')!r}, the registry says {asset.size} bytes"
    source = str(card.get("source"))
    for part in (asset.wheel, asset.hub_repo, asset.hub_revision, asset.url):
        if part and part not in source:
            yield f"source does not name {part}"
    cached = assets.cache_path(asset)
    if cached.is_file() and assets.sha256_of(cached) != card.get("sha256"):
        yield f"the file {cached} does not have the card's sha256"


def _listed(profiles_dir: Path) -> dict[str, list[str]]:
    """`cards` of each chapter's profile file."""
    return {
        path.stem: list(tomllib.loads(path.read_text(encoding="utf-8")).get("cards", []))
        for path in sorted(profiles_dir.glob("[0-9]*.toml"))
    }


def _used_by_profiles(profiles_dir: Path) -> Iterator[tuple[str, str]]:
    """Hub ids among the settings: "owner/name", or "owner/name:config" for a data set."""
    for path in sorted(profiles_dir.glob("[0-9]*.toml")):
        for table in tomllib.loads(path.read_text(encoding="utf-8")).values():
            for value in table.values() if isinstance(table, dict) else ():
                hub_id = value.split(":")[0] if isinstance(value, str) else ""
                if _HUB_ID.fullmatch(hub_id):
                    yield f"{profiles_dir.name}/{path.name}", hub_id


def _used_by_notebooks(notebooks_dir: Path) -> tuple[list[tuple[str, str]], list[Problem]]:
    """Names used in code cells, and the cells that cannot be read."""
    used, problems = [], []
    for path in sorted(notebooks_dir.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        place = f"{notebooks_dir.name}/{path.relative_to(notebooks_dir)}"
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] != "code":
                continue
            # Magics and shell lines are not Python.
            code = re.sub(r"^[%!].*$", "", "".join(cell["source"]), flags=re.MULTILINE)
            try:
                used += [(place, name) for name in names_used(code, hub=True)]
            except SyntaxError as error:
                problems.append(Problem(place, f"cell {number} is not Python: {error.msg}"))
    return used, problems


def _used_by_package(package_dir: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(package_dir.rglob("*.py")):
        for name in names_used(path.read_text(encoding="utf-8")):
            yield f"{package_dir.name}/{path.relative_to(package_dir)}", name


@functools.lru_cache(maxsize=1024)
def names_used(code: str, hub: bool = False) -> tuple[str, ...]:
    """The data sets that a piece of Python names in a call, such as `assets.fetch("human-eval")`.

    With `hub`, also Hugging Face ids given to a `from_pretrained`.
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        arguments = [
            *node.args[:1],
            *(k.value for k in node.keywords if k.arg in ("name", "source")),
        ]
        for argument in arguments:
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                continue
            name = argument.value
            if called in _CALLS and name not in _BUILDERS:
                found.append(name)
            elif hub and called == "from_pretrained" and _HUB_ID.fullmatch(name):
                found.append(name)
    return tuple(found)
