"""Mutation tests: change one line of the library, run a test that guards it, expect red.

    CASES = [Mutation("mean for sum", "qwenlib.post_training.dpo", old, new,
                      "tests/post_training/test_dpo.py::test_naive_loop")]

    @pytest.mark.parametrize("mutation", CASES, ids=lambda m: m.name)
    def test_turns_red(mutation):
        assert_caught(mutation)

Everything happens in this process, so a case costs milliseconds: qwenlib's modules are set aside,
imported anew with the changed source in place of the file's, and put back afterwards. Guard tests
may be parametrised but take no fixtures.
"""

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """One edit and the test that must notice it.

    module: dotted name. old, new: the source text and its replacement; `old` occurs exactly once.
    test: "path/to/test_file.py::test_name", the path from the repository's root.
    """

    name: str
    module: str
    old: str
    new: str
    test: str


def assert_caught(mutation: Mutation) -> None:
    """Fail unless the guard passes on the real source and fails on the mutated one.

    Only a failed assertion counts as caught. Any other exception is raised: an edit that merely
    breaks the module proves nothing about the test.
    """
    path = _source_path(mutation.module)
    source = path.read_text(encoding="utf-8")
    found = source.count(mutation.old)
    if found != 1:
        raise ValueError(
            f"mutation {mutation.name!r} is stale: its text occurs {found} times in {path.name}; "
            "update tests/mutations"
        )
    with _library():
        _run(mutation.test)
    with _library({mutation.module: source.replace(mutation.old, mutation.new)}):
        try:
            _run(mutation.test)
        except (AssertionError, pytest.fail.Exception):
            return
    pytest.fail(f"{mutation.test} still passes with {mutation.name!r} in {mutation.module}")


def _source_path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@contextmanager
def _library(changed: dict[str, str] | None = None) -> Iterator[None]:
    """A fresh import of qwenlib, some modules with other source; the old modules come back."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name not in (changed or {}):
                return None
            file = _source_path(name)
            loader = _Loader(changed[name], str(file))
            places = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(
                name, file, loader=loader, submodule_search_locations=places
            )

    kept = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "qwenlib"
    }
    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "qwenlib"]:
            del sys.modules[name]
        sys.modules.update(kept)


class _Loader:
    def __init__(self, source: str, file: str):
        self.source, self.file = source, file

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.source, self.file, "exec"), module.__dict__)  # our own source, edited


def _run(test: str) -> None:
    """Import the test file anew and call the test, once for each of its parameter sets."""
    file, _, name = test.partition("::")
    spec = importlib.util.spec_from_file_location("mutation_guard", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    for arguments in _parameter_sets(function):
        function(**arguments)


def _parameter_sets(function: Callable) -> Iterator[dict]:
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    choices = []
    for mark in marks:
        names, values = mark.args[:2]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, v if len(names) > 1 else (v,))) for v in values])
    for combination in itertools.product(*choices):
        yield {key: value for part in combination for key, value in part.items()}
