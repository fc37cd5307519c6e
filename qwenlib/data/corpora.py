"""Real text that is already on every machine with this package: five sources of documents.

`documents(source, limit_mb, seed)` streams one source in an order that depends only on the seed
and on the installed package versions. Text is read from files, never by importing a package.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import inspect
import random
import re
import sysconfig
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

SOURCES = ("code", "prose", "languages", "maths", "retrieval")

# Permissively licensed (BSD, Apache-2.0, PSF) and already dependencies of this package.
PROSE_PACKAGES = (
    "numpy", "scipy", "sklearn", "pandas", "matplotlib", "seaborn", "torch",
    "transformers", "datasets", "einops", "networkx", "sympy",
)  # fmt: skip
PROSE_DISTRIBUTIONS = (
    "numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "seaborn", "torch", "transformers",
    "datasets", "einops", "jupyterlab", "jupyter_server", "jupyter_client", "papermill",
)  # fmt: skip

_SKIP_FOLDERS = {
    "test", "tests", "testing", "site-packages", "dist-packages", "idle_test", "lib2to3",
    "ensurepip", "pydoc_data", "__pycache__", "_vendor", "_vendored", "externals",
}  # fmt: skip
_PIECE_CHARS = 8_000  # a long module becomes several documents, and so does a long manual page
_MIN_DOCSTRING = 120
_MIN_TRANSLATIONS = 8


@dataclass(frozen=True)
class Document:
    """One text with where it came from; the part of `id` before `#` names its file."""

    id: str
    text: str
    source: str  # one of SOURCES
    domain: str  # finer: package, application, task family
    language: str  # ISO code of the natural language, "python" for code

    @property
    def group(self) -> str:
        """The file the document was cut from; a split never parts a group."""
        return self.id.split("#", 1)[0]


def documents(source: str, limit_mb: float | None = None, seed: int = 0) -> Iterator[Document]:
    """Stream about `limit_mb` megabytes (UTF-8; None: all) of one source; ValueError if unknown."""
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; choose one of {', '.join(SOURCES)}")
    if limit_mb is not None and limit_mb <= 0:
        raise ValueError(f"limit_mb is {limit_mb}; give a positive number of megabytes or None")
    if limit_mb is None and source in ("maths", "retrieval"):
        raise ValueError(f"source {source!r} is generated without end; give limit_mb")
    if source == "maths":
        from qwenlib.data import tasks

        stream = tasks.corpus_documents(seed, limit_mb)
    elif source == "retrieval":
        from qwenlib.data import retrieval

        stream = retrieval.corpus_documents(seed, limit_mb)
    else:
        stream = {"code": _code, "prose": _prose, "languages": _languages}[source](seed)
    return _limit(stream, limit_mb)


def own_documents(origin: str, limit_mb: float | None = None, seed: int = 0) -> Iterator[Document]:
    """Documents (source "user") of a Parquet, JSON-lines or text path, or of a hub data set.

    A hub data set is `owner/name` or `owner/name:config`; it is streamed. Rows need a `text`
    column (ValueError names those there are); text files give one document a file.
    """
    import datasets

    path = Path(origin).expanduser()
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
        files = [p for p in files if p.suffix in kinds]
        if not files:
            raise ValueError(f"{origin} has no {', '.join(kinds)} file")
        kind = kinds[files[0].suffix]
        options = {"sample_by": "document"} if kind == "text" else {}
        names = [str(p) for p in files if kinds[p.suffix] == kind]
        rows = datasets.load_dataset(kind, data_files=names, split="train", streaming=True,
                                     **options)  # fmt: skip
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", origin):
        name, _, config = origin.partition(":")
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
    else:
        raise ValueError(f"{origin!r} is neither a path that exists nor a hub id owner/name")
    return _limit(_user(rows.shuffle(seed=seed, buffer_size=1_000), origin), limit_mb)


def _user(rows: Iterable[dict], origin: str) -> Iterator[Document]:
    for row in rows:
        if "text" not in row:
            raise ValueError(f"{origin} has no column 'text', only {', '.join(row)}")
        # The row's own id where there is one; else its text, for its number depends on the seed.
        key = str(row.get("id") or sha256(row["text"].encode()).hexdigest()[:16])
        if row["text"].strip():
            yield Document(f"user/{key}", row["text"], "user", Path(origin).stem, "und")


def sha(documents: Iterable[Document]) -> str:
    """sha256 over ids and texts: two machines with the same corpus print the same value."""
    digest = sha256()
    for document in documents:
        digest.update(f"{document.id}\x00{document.text}\x00".encode())
    return digest.hexdigest()


def write_parquet(documents: Iterable[Document], path: Path) -> None:
    """Documents as Parquet rows with the columns id, text, source, domain, language."""
    import pyarrow
    import pyarrow.parquet

    rows = [vars(document) for document in documents]
    names = [field.name for field in fields(Document)]
    table = pyarrow.table(
        {name: pyarrow.array([r[name] for r in rows], "string") for name in names}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _limit(stream: Iterable[Document], limit_mb: float | None) -> Iterator[Document]:
    budget = float("inf") if limit_mb is None else limit_mb * 1e6
    for document in stream:
        if budget <= 0:
            return
        budget -= len(document.text.encode())
        yield document


def _shuffled(paths: Iterable, seed: int, name: str) -> list:
    ordered = sorted(paths)
    random.Random(f"{name}/{seed}").shuffle(ordered)
    return ordered


def _python_files(root: Path) -> list[Path]:
    return [
        path for path in root.rglob("*.py") if not _SKIP_FOLDERS & set(path.relative_to(root).parts)
    ]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
    except (UnicodeDecodeError, OSError):  # a few files carry other encodings on purpose
        return None


# --- code: the standard library ---------------------------------------------------------------


def _code(seed: int) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _shuffled(_python_files(root), seed, "code"):
        text = _read(path)
        if not text:
            continue
        name = path.relative_to(root).as_posix()
        domain = name.split("/")[0].removesuffix(".py")
        for part, piece in enumerate(cut_code(text, _PIECE_CHARS)):
            yield Document(f"code/{name}#{part}", piece, "code", domain, "python")


def cut_code(text: str, limit: int) -> list[str]:
    """Cut Python source into pieces of about `limit` characters, only before a def or class.

    Pieces are whole top-level statements; one of over twice `limit` (a large class) is cut once
    more between its methods.
    """
    pieces = []
    for piece in _cut(text, limit, _statement_starts(text, "")):
        if len(piece) > 2 * limit:
            pieces += _cut(piece, limit, _statement_starts(piece, "    "))
        else:
            pieces.append(piece)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def cut_prose(text: str, limit: int) -> list[str]:
    """Cut a text of over twice `limit` characters between paragraphs."""
    if len(text) <= 2 * limit:
        return [text]
    starts = [match.end() for match in re.finditer(r"\n\s*\n(?=\S)", text)]
    return [piece.strip() for piece in _cut(text, limit, starts) if piece.strip()]


def _statement_starts(text: str, indent: str) -> list[int]:
    """Offsets of def and class lines at this indent; a decorated one starts at its decorator."""
    pattern = rf"^{indent}(?:@|def |class |async def )"
    starts = []
    for match in re.finditer(pattern, text, re.MULTILINE):
        line_before = text[: match.start()].rpartition("\n")[0].rpartition("\n")[2]
        if not line_before.startswith(f"{indent}@"):
            starts.append(match.start())
    return starts


def _cut(text: str, limit: int, starts: list[int]) -> list[str]:
    pieces, begin = [], 0
    for start, following in zip(starts, [*starts[1:], len(text)], strict=False):
        if following - begin > limit and start > begin:
            pieces.append(text[begin:start])
            begin = start
    return [*pieces, text[begin:]]


# --- prose: reference manual topics, docstrings, package descriptions --------------------------


def _prose(seed: int) -> Iterator[Document]:
    yield from _topics(seed)
    yield from _descriptions()
    roots = {}
    for package in PROSE_PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        if spec and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    # Round robin over packages, so that a small limit is not all from the largest package.
    queues = [
        (package, root, _shuffled(_python_files(root), seed, package))
        for package, root in roots.items()
    ]
    while queues:
        for package, root, files in queues:
            if files:
                yield from _docstrings(files.pop(), root, package)
        queues = [queue for queue in queues if queue[2]]


def _prose_documents(id: str, text: str, domain: str) -> Iterator[Document]:
    pieces = cut_prose(text, _PIECE_CHARS)
    separator = "/" if "#" in id else "#"
    for part, piece in enumerate(pieces):
        name = id if len(pieces) == 1 else f"{id}{separator}{part}"
        yield Document(name, piece, "prose", domain, "en")


def _topics(seed: int) -> Iterator[Document]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    text = _read(path)
    if text is None:  # some distributions package the manual's topics apart
        return
    # The file is one assignment, `topics = {...}`: a literal, read without running it.
    topics = ast.literal_eval(ast.parse(text).body[-1].value)
    for name in _shuffled(topics, seed, "topics"):
        yield from _prose_documents(f"prose/topics/{name}", topics[name].strip(), "python")


def _descriptions() -> Iterator[Document]:
    for name in PROSE_DISTRIBUTIONS:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        texts = {f"prose/description/{name}": distribution.metadata.get_payload()}
        for file in distribution.files or ():
            licence = "license" in str(file).lower() or "licence" in str(file).lower()
            if file.suffix in (".md", ".rst") and not licence:
                texts[f"prose/{file.as_posix()}"] = _read(Path(distribution.locate_file(file)))
        for id, text in texts.items():
            if isinstance(text, str) and len(text.strip()) >= _MIN_DOCSTRING:
                yield from _prose_documents(id, text.strip(), name)


def _docstrings(path: Path, root: Path, package: str) -> Iterator[Document]:
    text = _read(path)
    if not text or '"""' not in text:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    file = path.relative_to(root.parent).as_posix()
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    seen: set[str] = set()
    for name, docstring in _walk(tree, module):
        if len(docstring) >= _MIN_DOCSTRING and name not in seen:  # overloads repeat a name
            seen.add(name)
            yield from _prose_documents(f"prose/{file}#{name}", f"{name}\n\n{docstring}", package)


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, inspect.cleandoc(docstring)
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}")


# --- languages: the translations of Django's interface -----------------------------------------


def _languages(seed: int) -> Iterator[Document]:
    from qwenlib import assets

    with zipfile.ZipFile(assets.fetch("django-locale")) as wheel:
        names = _language_names(wheel)
        catalogues = [n for n in wheel.namelist() if n.endswith("/LC_MESSAGES/django.po")]
        for path in _shuffled(catalogues, seed, "languages"):
            locale = re.search(r"/locale/([^/]+)/", path).group(1)
            language = locale.split("_")[0]
            if language == "en":
                continue
            pairs = read_po(wheel.read(path).decode("utf-8"))
            if len(pairs) < _MIN_TRANSLATIONS:
                continue
            application = path.split("/locale/")[0].rsplit("/", 1)[-1].replace("conf", "core")
            local = names.get(locale.replace("_", "-").lower(), names.get(language, language))
            lines = [f"{local} ({locale}), django.{application}", ""]
            for english, translation in pairs:
                # One message in four keeps its English: enough to learn translation from, without
                # the same English text once for each of a hundred languages.
                if sha256(f"{path}{english}".encode()).digest()[0] < 64:
                    lines.append(f"{english} = {translation}")
                else:
                    lines.append(translation)
            yield Document(
                f"languages/{locale}/{application}", "\n".join(lines), "languages",
                application, language,
            )  # fmt: skip


def _language_names(wheel: zipfile.ZipFile) -> dict[str, str]:
    """{"de": "Deutsch", ...} from the table in django/conf/locale/__init__.py."""
    try:
        tree = ast.parse(wheel.read("django/conf/locale/__init__.py"))
    except KeyError:
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LANG_INFO":
            table = ast.literal_eval(node.value)
            return {code: row["name_local"] for code, row in table.items() if "name_local" in row}
    return {}


@functools.cache
def _quoted() -> re.Pattern:
    return re.compile(r'^(?:(msgid|msgid_plural|msgstr|msgstr\[\d+\]|msgctxt)\s+)?"(.*)"\s*$')


def read_po(text: str) -> list[tuple[str, str]]:
    """(English, translation) pairs of a gettext catalogue; fuzzy and untranslated ones dropped."""
    pairs = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        fields: dict[str, str] = {}
        field, fuzzy = None, False
        for line in block.split("\n"):
            if line.startswith("#"):
                fuzzy = fuzzy or (line.startswith("#,") and "fuzzy" in line)
                continue
            match = _quoted().match(line)
            if not match:
                continue
            field = match.group(1) or field
            if field:
                fields[field] = fields.get(field, "") + _unescape(match.group(2))
        english = fields.get("msgid", "")
        plural = fields.get("msgid_plural", english)
        # The last plural form is the general one ("%d days"), the first may hide the number.
        forms = [fields[key] for key in sorted(fields) if key.startswith("msgstr")]
        translation = forms[-1] if forms else ""
        if english and translation and not fuzzy:
            pairs.append((" ".join(plural.split()), " ".join(translation.split())))
    return pairs


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m.group(1), m.group(1)), text)
