"""Parameters from the command line and YAML files, checked against the notebooks before a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenlib import stages
from qwenlib.stages import ParameterError


class EnvironmentProblem(RuntimeError):
    """Something outside the parameters is missing: a notebook, a package, a free run folder."""


def notebook_path(chapter: str) -> Path:
    """The chapter's notebook; raises EnvironmentProblem when it is not there."""
    try:
        path = stages.notebooks_dir() / f"{chapter}.ipynb"
    except FileNotFoundError as error:
        raise EnvironmentProblem(str(error)) from None
    if not path.is_file():
        raise EnvironmentProblem(f"no notebook {path}")
    return path


def table(chapter: str) -> dict[str, stages.Parameter]:
    """Typed parameters of a chapter, in the order of its parameters cell."""
    return stages.notebook_parameters(notebook_path(chapter))


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """`["seed=1", ...]` as a dict of texts; raises ParameterError for a bad or doubled one."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ParameterError(f"-p {text!r}: expected name=value")
        if name in found:
            raise ParameterError(f"parameter {name!r} is given twice")
        found[name] = value.strip()
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Parameters from a YAML mapping `name: value`; raises ParameterError when it is not one."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ParameterError(f"-f {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ParameterError(f"-f {path}: not YAML ({error})") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ParameterError(f"-f {path}: expected a mapping of parameter names to values")
    return data


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user asked for: YAML values first, then `-p` texts on top."""

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.values, *self.texts]))

    def only(self, names: Sequence[str]) -> Given:
        return Given(
            {k: v for k, v in self.values.items() if k in names},
            {k: v for k, v in self.texts.items() if k in names},
        )

    def typed(self, parameters: Mapping[str, stages.Parameter]) -> dict[str, Any]:
        """Values converted to the notebook's types, for the names it knows."""
        found: dict[str, Any] = {}
        for name, value in self.values.items():
            if name not in parameters or name in self.texts:
                continue
            kind = parameters[name].type
            # YAML 1.1 reads 1e-3 as text.
            number = isinstance(value, str) and kind.base is float and not kind.is_list
            found[name] = kind.from_text(name, value) if number else kind.check(name, value)
        for name, text in self.texts.items():
            if name in parameters:
                found[name] = parameters[name].type.from_text(name, text)
        for name, value in found.items():
            stages.check_choice(name, value)
        return found


def refuse_unknown(given: Given, chapters: Sequence[str]) -> None:
    """Raise ParameterError for a name that none of these chapters has."""
    known: dict[str, None] = {}
    profile_keys: set[str] = set()
    for chapter in chapters:
        known |= dict.fromkeys(table(chapter))
        profile_keys |= set(stages.load_chapter(chapter).tables["tiny"])
    for name in given.names():
        if name in known:
            continue
        where = chapters[0] if len(chapters) == 1 else "all chapters"
        if name in profile_keys:
            raise ParameterError(
                f"{name!r} is a setting of the profiles, not a parameter of {where}; give it a "
                "line in the notebook's parameters cell to change it from outside"
            )
        raise ParameterError(f"unknown parameter {name!r} of {where}{stages.nearest(name, known)}")


def resolve(chapter: str, given: Given) -> tuple[stages.Resolved, dict[str, Any]]:
    """The chapter's full settings under `given`, and the values to hand to the notebook."""
    parameters = table(chapter)
    typed = given.typed(parameters)
    values = {name: typed.get(name, p.default) for name, p in parameters.items()}
    resolved = stages.resolve(chapter, values, {name: p.type for name, p in parameters.items()})
    origin = {
        name: where if where != "parameter" else "given" if name in typed else "notebook"
        for name, where in resolved.origin.items()
    }
    return dataclasses.replace(resolved, origin=origin), typed
