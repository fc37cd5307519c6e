"""Stages of the walk: profiles, typed parameters, run folders and fingerprints (no torch here)."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
PROFILES = ("tiny", "small", "full", "smoke")
CHOICES = {
    "profile": PROFILES,
    "device": ("auto", "cpu", "cuda"),
    "wandb_mode": ("offline", "online", "disabled"),
    "missing_input": ("build", "stop"),
}
STANDARD = ("profile", "seed", "device", "run_dir", "wandb_mode", "missing_input")
# Parameters that name a model (folder, .gguf file, hub id, registered name): what each stands in
# for is written in a table of its name in the chapter's profile file: it `replaces` these needs,
# though it `compares` itself with those of them that are finished; one not given takes the
# `base_model` that the finished run of the stage it `follows` began from.
MODEL_PARAMETERS = ("base_model", "merge_base")
# Where and how a stage runs, not what it computes: left out of the fingerprint.
NOT_IN_FINGERPRINT = ("run_dir", "wandb_mode", "device", "missing_input")
# These files present results or start runs; they cannot change a number in a stage.
NOT_IN_SOURCE_HASH = {
    "batch", "profiles", "cli.py", "__main__.py", "plotting.py", "notebook.py", "recorder.py",
    "stages.py",
}  # fmt: skip
# Raise when the seeding in notebook.py or the rules of this file change what a stage computes.
FINGERPRINT_VERSION = 1
# Files of a stage folder that describe a run; everything else is the stage's output.
RECORDS = {"results.json", "started.json", "metrics.jsonl", "notebook.ipynb", "notebook.html"}
RECORD_FOLDERS = {"figures", "state", "wandb"}
HASH_LIMIT = 256 * 2**20  # bytes; larger output files are recorded by size only


class ParameterError(ValueError):
    """A parameter that does not exist, has the wrong type or a value outside its choices."""


class MissingInput(RuntimeError):
    """A stage that is needed has not been run (or has not finished)."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `words`, or the list of them when none is close."""
    words = list(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(words) or 'none'}"


# ---------------------------------------------------------------- typed parameters

_BASES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclasses.dataclass(frozen=True)
class ParameterType:
    """`int`, `float`, `str`, `bool` or a list of one of them, optionally `| None`."""

    base: type
    is_list: bool = False
    optional: bool = False

    @classmethod
    def parse(cls, annotation: object) -> ParameterType:
        """Read an annotation (a type, or its source text); raises ParameterError otherwise."""
        text = annotation.__name__ if annotation in _BASES.values() else str(annotation)
        parts = text.strip("'\"").replace("typing.", "").replace(" ", "")
        if wrapped := re.fullmatch(r"Optional\[(.+)\]", parts):
            parts = wrapped[1] + "|None"
        names = parts.split("|")
        optional = "None" in names
        names = [name for name in names if name != "None"]
        name = names[0] if len(names) == 1 else ""
        inner = re.fullmatch(r"list\[(\w+)\]", name)
        base = _BASES.get(inner[1] if inner else name)
        if base is None:
            raise ParameterError(
                f"type {text!r} is not supported; use int, float, str, bool, list[...] of them, "
                "or one of them with `| None`"
            )
        return cls(base, inner is not None, optional)

    def __str__(self) -> str:
        name = f"list[{self.base.__name__}]" if self.is_list else self.base.__name__
        return f"{name} | None" if self.optional else name

    def check(self, name: str, value: object) -> Any:
        """`value` as this type (an int may stand for a float); raises ParameterError."""
        if value is None and self.optional:
            return None
        if self.is_list:
            if not isinstance(value, (list, tuple)):
                raise self._wrong(name, value)
            one = ParameterType(self.base)
            return [one.check(f"{name}[{i}]", item) for i, item in enumerate(value)]
        if self.base is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, self.base) or (self.base is not bool and isinstance(value, bool)):
            raise self._wrong(name, value)
        return value

    def from_text(self, name: str, text: str) -> Any:
        """Read a command-line value; raises ParameterError that names the expected type."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        if self.is_list:
            one = ParameterType(self.base)
            items = text.strip().removeprefix("[").removesuffix("]").split(",")
            items = [item.strip() for item in items if item.strip()]
            return [one.from_text(f"{name}[{i}]", item) for i, item in enumerate(items)]
        if self.base is bool:
            if text.lower() not in ("true", "false"):
                raise self._wrong(name, text)
            return text.lower() == "true"
        try:
            return self.base(text)
        except ValueError:
            raise self._wrong(name, text) from None

    def _wrong(self, name: str, value: object) -> ParameterError:
        return ParameterError(f"parameter {name!r}: expected {self}, got {value!r}")


def check_choice(name: str, value: Any) -> None:
    """Raise ParameterError when `name` has a fixed set of values and `value` is not one."""
    if name in CHOICES and value not in CHOICES[name]:
        raise ParameterError(
            f"parameter {name!r}: {value!r} is not one of {' | '.join(CHOICES[name])}"
            + nearest(str(value), CHOICES[name]).replace("; known", "; choose from")
        )
    if name == "seed" and value < 0:
        raise ParameterError(f"parameter 'seed': expected 0 or more, got {value}")


# ---------------------------------------------------------------- profiles


@dataclasses.dataclass(frozen=True)
class Chapter:
    """One `profiles/<chapter>.toml`: what the stage needs and its settings in each profile."""

    name: str
    title: str
    needs: tuple[str, ...]
    cards: tuple[str, ...]
    tables: Mapping[str, Mapping[str, Any]]
    resources: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]  # the tables of MODEL_PARAMETERS
    help: Mapping[str, Mapping[str, str]]  # table -> key -> what is written behind the value

    @property
    def number(self) -> int:
        return int(self.name[:2])


def profiles_dir() -> Path:
    """Folder with one TOML file a chapter (QWENLIB_PROFILES overrides the packaged one)."""
    override = os.environ.get("QWENLIB_PROFILES")
    return Path(override) if override else Path(str(resources.files("qwenlib") / "profiles"))


def chapter_names() -> list[str]:
    """All chapters that have a profile, in reading order."""
    return sorted(path.stem for path in profiles_dir().glob("[0-9][0-9]_*.toml"))


def load_chapter(name: str) -> Chapter:
    """Read and check a chapter's profiles; raises ParameterError naming the file and the key."""
    path = profiles_dir() / f"{name}.toml"
    if not path.is_file():
        raise ParameterError(f"no chapter {name!r} ({path})" + nearest(name, chapter_names()))
    text = path.read_text()
    data = tomllib.loads(text)
    tables = {key: data.get(key) for key in ("tiny", "small", "full")}
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ParameterError(f"{path.name}: table [{key}] is missing")
        if odd := set(table) ^ set(tables["tiny"]):
            raise ParameterError(f"{path.name}: [{key}] and [tiny] differ in {sorted(odd)}")
    smoke = data.get("smoke", {})
    if unknown := set(smoke) - set(tables["tiny"]):
        raise ParameterError(f"{path.name}: [smoke] has keys that [tiny] lacks: {sorted(unknown)}")
    tables["smoke"] = {**tables["tiny"], **smoke}
    return Chapter(
        name=name,
        title=data.get("title", name),
        needs=tuple(data.get("needs", ())),
        cards=tuple(data.get("cards", ())),
        tables=tables,
        resources=data.get("resources", {}),
        models={key: _model_table(path, key, data) for key in MODEL_PARAMETERS if key in data},
        help=_comments(text),
    )


def _model_table(path: Path, key: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    empty = {"replaces": [], "compares": [], "follows": None, "suggested": {}}
    table = empty | data[key]
    if odd := set(table["suggested"]) - set(data.get("tiny", {})):
        raise ParameterError(f"{path.name}: [{key}] suggests {sorted(odd)}, which [tiny] lacks")
    if odd := set(table) - set(empty):
        raise ParameterError(f"{path.name}: table [{key}] has unknown keys: {sorted(odd)}")
    named = {*table["replaces"], *table["compares"], table["follows"]} - {None}
    if odd := named - set(data.get("needs", ())):
        raise ParameterError(f"{path.name}: table [{key}] names {sorted(odd)}, not among the needs")
    return table


def _comments(text: str) -> dict[str, dict[str, str]]:
    """Trailing comments of a TOML file, table by table: what each key means, or why this value."""
    found: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            table = found.setdefault(header[1], {})
        match = re.match(r"""\s*(\w+)\s*=\s*(?:"[^"]*"|'[^']*'|[^#"'])*#\s*(.+?)\s*$""", line)
        if match:
            table[match[1]] = match[2]
    return found


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Parameters of one stage after the profile and the run folder have filled the gaps."""

    chapter: Chapter
    params: dict[str, Any]
    origin: dict[str, str]  # name -> "parameter", "profile tiny" or "stage 08_sft"

    @property
    def profile(self) -> str:
        return self.params["profile"]

    @property
    def models(self) -> dict[str, str]:
        """The models named by parameters instead of being taken from an earlier stage."""
        return {k: self.params[k] for k in MODEL_PARAMETERS if self.params.get(k) is not None}

    def meanings(self, cell: Mapping[str, Parameter]) -> dict[str, str]:
        """Words for each setting: a profile's for its own value, else the parameters cell's."""
        table = "tiny" if self.profile == "smoke" else self.profile
        profile = self.chapter.help.get(table, {})
        own = {name: parameter.help for name, parameter in cell.items()}
        return {
            name: (profile if self.origin[name].startswith("profile") else own).get(name, "")
            for name in self.params
        }


def resolve(name: str, values: Mapping[str, Any], types: Mapping[str, ParameterType]) -> Resolved:
    """Typed parameters, with each None filled from the profile or, a model that `follows` a stage,
    from that stage's finished run; raises ParameterError."""
    if missing := [key for key in STANDARD if key not in values]:
        raise ParameterError(f"{name}: the parameters cell lacks {', '.join(missing)}")
    checked = {key: types[key].check(key, value) for key, value in values.items()}
    for key, value in checked.items():
        check_choice(key, value)
    chapter = load_chapter(name)
    if odd := [key for key in MODEL_PARAMETERS if key in checked and key not in chapter.models]:
        raise ParameterError(f"{name}.toml lacks a table for the parameter {odd[0]!r}")
    profile = checked["profile"]
    table = chapter.tables[profile]
    params = dict(table)
    origin = dict.fromkeys(table, f"profile {profile}")
    for key, value in checked.items():
        if value is not None or key not in table:
            params[key] = value
            origin[key] = "parameter"
        elif key in types:
            params[key] = types[key].check(f"{key} ([{profile}] of {name}.toml)", table[key])
    order = [*checked, *(key for key in table if key not in checked)]
    resolved = Resolved(
        chapter, {key: params[key] for key in order}, {key: origin[key] for key in order}
    )
    run_dir = resolve_run_dir(params["run_dir"])
    for key, table in chapter.models.items():
        stage = table["follows"]
        if params.get(key) is None and stage in needs(resolved, run_dir):
            begun = (finished(run_dir, stage) or {}).get("parameters", {}).get("base_model")
            if begun is not None:
                resolved.params[key], resolved.origin[key] = begun, f"stage {stage}"
    return resolved


# ---------------------------------------------------------------- folders


def notebooks_dir() -> Path:
    """Folder of the chapters: QWENLIB_NOTEBOOKS, beside the package, or ./notebooks."""
    override = os.environ.get("QWENLIB_NOTEBOOKS")
    candidates = [Path(override)] if override else [PACKAGE.parent / "notebooks", Path("notebooks")]
    for path in candidates:
        if path.is_dir():
            return path.resolve()
    raise FileNotFoundError(
        f"no notebooks in {' or '.join(map(str, candidates))}; run from a clone of the "
        "repository or set QWENLIB_NOTEBOOKS to its notebooks folder"
    )


def find_notebook(name: str) -> Path | None:
    """The chapter's notebook file, or None when it is not on this machine."""
    try:
        path = notebooks_dir() / f"{name}.ipynb"
    except FileNotFoundError:
        return None
    return path if path.is_file() else None


def resolve_run_dir(run_dir: str | Path) -> Path:
    """Absolute run folder; inside notebooks/ a relative one starts at the repository root.

    So JupyterLab (which works in notebooks/) and the command line share `runs/default`.
    """
    path = Path(run_dir).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd()
    try:
        notebooks = notebooks_dir()
    except FileNotFoundError:
        return here / path
    inside = here == notebooks or notebooks in here.parents
    return (notebooks.parent if inside else here) / path


def model_source(value: str) -> str:
    """A model named by a parameter: an absolute path if it is one on disk (relative ones start
    where those of run_dir do), else the hub id or name as it stands."""
    path = resolve_run_dir(value)
    return str(path) if path.exists() else value


def write_json(path: Path, data: object) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content, or None when it is absent or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def outputs(stage_dir: Path) -> dict[str, dict[str, Any]]:
    """`path -> {bytes, sha256}` of the files a stage hands on (sha256 up to 256 MiB)."""
    found = {}
    for path in sorted(stage_dir.rglob("*")):
        relative = path.relative_to(stage_dir)
        if not path.is_file() or relative.parts[0] in RECORDS | RECORD_FOLDERS:
            continue
        if relative.parts[0].startswith("."):
            continue
        size = path.stat().st_size
        entry: dict[str, Any] = {"bytes": size}
        if size <= HASH_LIMIT:
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        found[relative.as_posix()] = entry
    return found


def finished(run_dir: Path, name: str) -> dict[str, Any] | None:
    """`results.json` of a stage that is done and whose output files are still there."""
    stage_dir = run_dir / name
    results = read_json(stage_dir / "results.json")
    if not results or results.get("status") != "done":
        return None
    for relative, entry in results.get("outputs", {}).items():
        path = stage_dir / relative
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return None
    return results


def needs(resolved: Resolved, run_dir: Path) -> tuple[str, ...]:
    """Stages whose files this one reads. A named model stands in for those that only hand on
    theirs; of the ones it is compared with it takes what is finished in `run_dir`."""
    tables = [resolved.chapter.models[name] for name in resolved.models]
    gone = {stage for table in tables for stage in table["replaces"]}
    kept = {s for table in tables for s in table["compares"] if finished(run_dir, s) is not None}
    return tuple(need for need in resolved.chapter.needs if need not in gone - kept)


def set_aside(run_dir: Path, name: str) -> None:
    """Empty a stage folder; a finished result moves to `<run_dir>/.previous/<stage>` (one kept)."""
    stage_dir = run_dir / name
    if not stage_dir.is_dir():
        return
    done = (read_json(stage_dir / "results.json") or {}).get("status") == "done"
    # The notebook files stay: papermill may be writing them at this moment. So does the lock.
    old = [path for path in stage_dir.iterdir() if not path.name.startswith(("notebook.", "."))]
    if done:
        previous = run_dir / ".previous" / name
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir(parents=True)
        # results.json goes first: from here on nobody takes the rest for a finished stage.
        for path in sorted(old, key=lambda path: path.name != "results.json"):
            os.replace(path, previous / path.name)
    else:
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------- parameters of a notebook


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # help`."""

    name: str
    type: ParameterType
    default: Any
    help: str


def notebook_parameters(path: Path) -> dict[str, Parameter]:
    """Parameters of a notebook, read from its cell tagged `parameters` without running it.

    Raises ParameterError for a missing or doubled cell and for a line that is not an annotated
    literal.
    """
    cells = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if "parameters" in cell["metadata"].get("tags", ())
    ]
    if len(cells) != 1:
        raise ParameterError(f"{path}: expected one cell tagged 'parameters', found {len(cells)}")
    lines, found = cells[0].splitlines(), {}
    for node in ast.parse(cells[0]).body:
        where = f"{path.name}, parameters cell, line {node.lineno}"
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            raise ParameterError(f"{where}: expected `name: type = literal  # help`")
        name = node.target.id
        try:
            kind = ParameterType.parse(ast.unparse(node.annotation))
            default = kind.check(name, ast.literal_eval(node.value))
        except (ValueError, ParameterError) as error:
            raise ParameterError(f"{where}: {error}") from None
        comment = lines[node.end_lineno - 1][node.end_col_offset :].strip()
        found[name] = Parameter(name, kind, default, comment.lstrip("# "))
    return found


# ---------------------------------------------------------------- fingerprints


def notebook_code(path: Path) -> list[str]:
    """Source of the code cells that compute: neither parameters nor the reader's exercises."""
    skipped = {"parameters", "injected-parameters", "exercise"}
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code" and not skipped & set(cell["metadata"].get("tags", ()))
    ]


def _rooms_imported(source: str, inside_package: bool) -> set[str]:
    """Top-level names of qwenlib that a piece of Python imports, at any depth."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with notebook magics
        return set(re.findall(r"qwenlib(?:\.| import )(\w+)", source))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qwenlib.")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module == "qwenlib":
                found |= {alias.name for alias in node.names}
            elif node.level == 0 and module.startswith("qwenlib."):
                found.add(module.split(".")[1])
            elif node.level and inside_package:
                # Relative: within the room, or one level up to another room.
                found |= {module.split(".")[0]} if module else {a.name for a in node.names}
    return found


@functools.lru_cache(maxsize=64)
def _room(room: str) -> tuple[str, frozenset[str]]:
    """Hash of a room's files (code and data) and the rooms it imports."""
    base = PACKAGE / room
    files = [base.with_suffix(".py")] if base.with_suffix(".py").is_file() else []
    if base.is_dir():
        files = [p for p in sorted(base.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    digest = hashlib.sha256()
    imported: set[str] = set()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE)}\0{len(content)}\0".encode() + content)
        if path.suffix == ".py":
            imported |= _rooms_imported(content.decode(), inside_package=True)
    return digest.hexdigest(), frozenset(imported)


def library_hash(code: Iterable[str]) -> str:
    """Hash of the rooms of qwenlib that this code reaches through imports."""
    excluded = {name.removesuffix(".py") for name in NOT_IN_SOURCE_HASH}
    todo = set().union(*(_rooms_imported(cell, inside_package=False) for cell in code))
    seen: dict[str, str] = {}
    while todo:
        room = todo.pop()
        exists = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
        if room in seen or room in excluded or not exists:
            continue
        seen[room], more = _room(room)
        todo |= more
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()


def input_record(run_dir: Path, name: str) -> dict[str, str]:
    """What identifies a finished stage as an input: its fingerprint and a hash of its files."""
    results = finished(run_dir, name)
    if results is None:
        raise MissingInput(f"stage {name} is not finished in {run_dir}")
    files = json.dumps(results.get("outputs", {}), sort_keys=True)
    return {
        "fingerprint": results["fingerprint"],
        "outputs_sha256": hashlib.sha256(files.encode()).hexdigest(),
    }


def model_record(value: str) -> dict[str, str]:
    """What identifies a named model as an input: its files' sizes and dates where it is a path.

    A hub id or registered name stands for itself.
    """
    path = Path(model_source(value))
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = [
        (os.path.relpath(p, path), p.stat().st_size, p.stat().st_mtime_ns)
        for p in files
        if p.exists()
    ]
    return {"files_sha256": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


def fingerprint(resolved: Resolved, run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Hash of all that decides a stage's result, and its parts (to say what changed).

    Raises MissingInput when a stage that is needed has not finished.
    """
    path = find_notebook(resolved.chapter.name)
    code = notebook_code(path) if path else []
    parts = {
        "version": FINGERPRINT_VERSION,
        "chapter": resolved.chapter.name,
        "parameters": {
            key: value for key, value in resolved.params.items() if key not in NOT_IN_FINGERPRINT
        },
        "notebook": hashlib.sha256(json.dumps(code).encode()).hexdigest(),
        "library": library_hash(code),
        "inputs": {need: input_record(run_dir, need) for need in needs(resolved, run_dir)}
        | {name: model_record(value) for name, value in resolved.models.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), parts


def what_changed(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """Which parts of a fingerprint differ, in words."""
    if not old:
        return "first run"
    changed = [key for key in ("notebook", "library", "inputs") if old.get(key) != new.get(key)]
    before, after = old.get("parameters", {}), new["parameters"]
    changed += [key for key in after if before.get(key) != after[key]]
    return "changed: " + ", ".join(changed) if changed else "unchanged"


# ---------------------------------------------------------------- processes


def process_started(pid: int) -> str | None:
    """A mark that tells a process from a later one with the same id; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat[stat.rindex(")") + 2 :].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def started_note(fingerprint_: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `started.json`: who writes this stage folder, and for which fingerprint."""
    runner = os.environ.get("QWENLIB_RUNNER_PID")
    note: dict[str, Any] = {
        "fingerprint": fingerprint_,
        "fingerprint_parts": dict(parts),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
    }
    if runner:
        note |= {"runner": int(runner), "runner_started": process_started(int(runner))}
    return note
