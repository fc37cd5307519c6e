import itertools
import zipfile
from collections import Counter

import pytest

from qwenlib import assets
from qwenlib.data import corpora
from qwenlib.data.corpora import Document, cut_code, cut_prose, documents, read_po

PO = r"""
msgid ""
msgstr "Content-Type: text/plain\n"

#: views.py:1
msgid "Save"
msgstr "Sichern"

#, fuzzy
msgid "Delete"
msgstr "Speichern"

msgid "Untranslated"
msgstr ""

msgctxt "noun"
msgid "View"
msgstr "Ansicht"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"
msgstr[1] "%d Tage"

msgid ""
"A long "
"\"quoted\" message"
msgstr ""
"Eine lange "
"\"zitierte\" Nachricht"

#~ msgid "Old"
#~ msgstr "Alt"
"""


def test_po_pairs_by_hand():
    assert read_po(PO) == [
        ("Save", "Sichern"),
        ("View", "Ansicht"),
        ("%d days", "%d Tage"),
        ('A long "quoted" message', 'Eine lange "zitierte" Nachricht'),
    ]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A Django wheel in small: two languages with enough messages, English, one nearly empty."""
    path = tmp_path / "django.whl"
    messages = "\n\n".join(f'msgid "text {i}"\nmsgstr "Text {i} übersetzt"' for i in range(20))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "django/conf/locale/__init__.py", 'LANG_INFO = {"de": {"name_local": "Deutsch"}}'
        )
        for locale in ("de", "pt_BR", "en"):
            file.writestr(f"django/conf/locale/{locale}/LC_MESSAGES/django.po", messages)
        file.writestr("django/contrib/gis/locale/fr/LC_MESSAGES/django.po", 'msgid "a"\nmsgstr "b"')
    monkeypatch.setattr(assets, "fetch", lambda name: {"django-locale": path}[name])


def test_languages_one_document_an_application(wheel):
    docs = sorted(documents("languages"), key=lambda d: d.id)
    assert [(d.id, d.language, d.domain) for d in docs] == [
        ("languages/de/core", "de", "core"),
        ("languages/pt_BR/core", "pt", "core"),
    ]
    lines = docs[0].text.split("\n")
    assert lines[0] == "Deutsch (de), django.core"
    bilingual = [line for line in lines if " = " in line]
    assert 0 < len(bilingual) < 20 and len(lines) == 22
    assert all(line.startswith("text ") and line.endswith("übersetzt") for line in bilingual)


@pytest.mark.parametrize("source", ["code", "prose"])
def test_same_seed_same_documents_other_seed_other_order(source):
    first = list(documents(source, 0.2, seed=0))
    assert first == list(documents(source, 0.2, seed=0))
    assert first != list(documents(source, 0.2, seed=1))
    size = sum(len(d.text.encode()) for d in first)
    assert 0.2e6 <= size <= 0.2e6 + max(len(d.text.encode()) for d in first)
    assert {d.source for d in first} == {source}
    assert len({d.id for d in first}) == len(first)
    assert not any("/test/" in d.id or "site-packages" in d.id for d in first)


def test_smaller_limit_is_a_prefix():
    small, large = (list(documents("code", limit, seed=3)) for limit in (0.1, 0.3))
    assert large[: len(small)] == small


def test_prose_mixes_manual_and_packages():
    domains = Counter(d.domain for d in documents("prose", 1.5, seed=0))
    assert domains["python"] > 10 and domains["numpy"] and domains["sklearn"]
    assert len(domains) >= 5


def test_pieces_of_a_module_put_together_are_the_module():
    decorated = "".join(f"\n\n@decorator\ndef f{i}():\n    return {i}\n" for i in range(50))
    text = '"""Doc."""\nimport os\n' + decorated + "\n\nclass A:\n    def g(self): ...\n"
    pieces = cut_code(text, 200)
    assert len(pieces) > 5
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert not any(piece.rstrip().endswith("@decorator") for piece in pieces)
    for piece in pieces:
        compile(piece, "piece", "exec")
    assert cut_code("x = 1\n", 200) == ["x = 1"]


def test_a_large_class_is_cut_between_methods():
    methods = "".join(
        f"    @staticmethod\n    def f{i}(a):\n        return {i}\n\n" for i in range(40)
    )
    text = "x = 1\n\nclass A:\n" + methods
    pieces = cut_code(text, 300)
    assert len(pieces) > 5 and max(map(len, pieces)) < 600
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.startswith("    @staticmethod") for piece in pieces[2:])


def test_prose_is_cut_between_paragraphs_only_when_long():
    text = "\n\n".join(f"Paragraph {i} of a manual page, one line." for i in range(50))
    assert cut_prose(text, len(text)) == [text]
    pieces = cut_prose(text, 400)
    assert max(map(len, pieces)) <= 400 and "\n\n".join(pieces) == text


def test_group_is_the_file():
    assert Document("code/a.py#1", "", "code", "a", "python").group == "code/a.py"
    groups = [d.group for d in itertools.islice(documents("code", 1, 0), 100)]
    assert len(set(groups)) < len(groups)


def test_unknown_source_and_bad_limit_are_named():
    with pytest.raises(ValueError, match="unknown source 'web'.*code, prose"):
        documents("web")
    for source in ("maths", "retrieval"):
        with pytest.raises(ValueError, match=f"{source}.*give limit_mb"):
            documents(source)
    with pytest.raises(ValueError, match="limit_mb is 0"):
        documents("code", 0)


def test_hash_covers_text_and_order():
    a, b = (Document(i, t, "code", "x", "python") for i, t in (("1", "one"), ("2", "two")))
    assert corpora.sha([a, b]) == corpora.sha([a, b]) != corpora.sha([b, a])


def test_parquet_round_trip_and_own_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [Document(f"code/a.py#{i}", f"text {i} ü", "code", "a", "python") for i in range(5)]
    path = tmp_path / "own" / "part.parquet"
    corpora.write_parquet(docs, path)
    import datasets

    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["id", "text", "source", "domain", "language"]
    assert [Document(**row) for row in table] == docs
    own = list(corpora.own_documents(str(path.parent), seed=0))
    assert {d.text for d in own} == {d.text for d in docs}
    assert {d.source for d in own} == {"user"} and len({d.id for d in own}) == 5


def test_own_text_files_are_one_document_each(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"first line {i}\n\nsecond line\n")
    texts = {d.text for d in corpora.own_documents(str(tmp_path))}
    assert len(texts) == 3 and all("second line" in text for text in texts)


def test_own_text_errors_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(ValueError, match="no column 'text', only content"):
        list(corpora.own_documents(str(tmp_path)))
    with pytest.raises(ValueError, match="neither a path that exists nor a hub id"):
        corpora.own_documents(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .parquet"):
        corpora.own_documents(str(tmp_path / "empty"))
