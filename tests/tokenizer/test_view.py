"""Views: what stands in the HTML, and the explorer as a widget and as a static page."""

import html
import re
import sys
import time

import pytest

from qwenlib.tokenizer import bpe
from qwenlib.tokenizer.gpt2 import GPT2Tokenizer
from qwenlib.tokenizer.view import (
    explorer,
    explorer_html,
    merges_html,
    pieces_html,
    token_html,
    token_text,
)

WIDGET = "application/vnd.jupyter.widget-view+json"
MERGES = [(b"h", b"e"), (b"t", b"he"), (b" ", b"the"), (b"\xf0", b"\x9f")]
RANKS = {pair: rank for rank, pair in enumerate(MERGES)}
SMALL = GPT2Tokenizer(MERGES)
BYTES = GPT2Tokenizer([])
BOTH = {"small": SMALL, "bytes": BYTES}


def shown(page):
    """The text of each span, as a reader sees it."""
    return [html.unescape(text) for text in re.findall(r"<span[^>]*>(.*?)</span>", page)]


def test_tooltips_have_ids_and_places():
    ids, offsets = SMALL.encode_with_offsets("the 🙂")
    page = token_html(SMALL, ids, offsets=offsets)
    assert shown(page) == ["the", "·", "<f0><9f>", "<99>", "<82>"]
    titles = re.findall('title="(.*?)"', page)
    assert titles[0] == "257 · characters 0 to 3"
    assert titles[-1] == f"{ids[-1]} · characters 4 to 5"
    assert 'title="257"' in token_html(SMALL, ids)
    with pytest.raises(ValueError, match="5 ids but 10 offsets"):
        token_html(SMALL, ids, offsets=offsets * 2)


def test_neighbours_differ_in_shade_and_control_tokens_stand_out():
    ids = [*SMALL.encode("thehe"), SMALL.control["<|endoftext|>"]]
    shades = re.findall("background:(#.*?);", token_html(SMALL, ids, [0, 1, 1]))
    assert len(shades) == len(set(shades)) == 3
    again = re.findall("background:(#.*?);", token_html(SMALL, [*ids[:2], ids[0]]))
    assert again[0] == again[2] != again[1]
    assert shades[2] == re.findall("background:(#.*?);", token_html(SMALL, ids))[2]


def test_pieces_stay_on_a_line():
    page = pieces_html(["a", " <b>", "\r\n", "\t"])
    assert shown(page) == ["a", "·<b>", "␍⏎", "⇥"]
    assert "<br>" not in page and "title" not in page
    assert shown(pieces_html([])) == []
    long = pieces_html(["x"] * 1501)
    assert len(shown(long)) == 1500 and "… and 1 more piece." in long


def test_split_characters_are_bytes_and_whole_ones_text():
    assert token_text(" naï".encode()) == "·naï"
    assert token_text(b" \xe5\x8c") == "·<e5><8c>"
    assert token_text(b"\x97\xe4\xba\xac\xf0") == "<97>京<f0>"
    assert token_text(b"") == ""


def rows(page):
    """Cells of each row of a table, without marks."""
    clean = lambda cell: html.unescape(re.sub("<.*?>", "", cell))  # noqa: E731
    return [
        [clean(cell) for cell in re.findall("<td.*?>(.*?)</td>", row)]
        for row in re.findall("<tr.*?>(.*?)</tr>", page)
    ]


def test_merges_one_by_one():
    page = merges_html(["the", " the"], RANKS, {b"he": 7, b"the": 1234})
    head, *body = rows(page)
    assert head == []
    assert body == [
        ["bytes", "", "", "t\u2002h\u2002e"],
        ["1", "h\u2002e", "7", "t\u2002he"],
        ["2", "t\u2002he", "1,234", "the"],
        ["bytes", "", "", "·\u2002t\u2002h\u2002e"],
        ["1", "h\u2002e", "7", "·\u2002t\u2002he"],
        ["2", "t\u2002he", "1,234", "·\u2002the"],
        ["3", "·\u2002the", "0", "·the"],
    ]
    assert page.count("<b>") == 5  # what each merge has made


@pytest.mark.parametrize("text", ["", "🙂", "ภาษาไทย", "<b>&the", "the " * 5000])
def test_any_sentence_has_a_table(text):
    words = bpe.pretokenize(text)
    page = merges_html(words, RANKS)
    head, *body = rows(page)
    expected = [bpe.merge_steps(word.encode(), RANKS) for word in words[:12]]
    assert len(body) == sum(map(len, expected))
    assert [row[0] for row in body].count("bytes") == len(expected)
    assert len(page) < 100_000
    left_out = re.findall("and ([0-9,]+) more pre-token", page)
    assert left_out == ([f"{len(words) - 12:,}"] if len(words) > 12 else [])
    if not text:
        assert "No text" in page


def test_many_words():
    page = merges_html(["x"] * 13, RANKS)
    assert len(rows(page)) == 1 + 12
    assert "and 1 more pre-token." in page


def test_long_words_stay_out_of_the_table():
    page = merges_html(["the", "x" * 97, "x" * 96, "y" * 96, "the"], RANKS)
    states = [row[-1] for row in rows(page)[1:]]
    assert states[3] == "97, too many for this table"
    assert states[4] == "\u2002".join("x" * 96)
    busy = {(b"a" + b"x" * n, b"x"): n for n in range(95)}
    page = merges_html(["a" + "x" * 95] * 4, busy)
    assert len(rows(page)) == 1 + 2 * 96
    assert "and 2 more pre-tokens" in page
    assert merges_html(["x" * 10_000_000], RANKS).count("<tr") == 2


def test_static_view_counts_all_and_shows_the_first():
    page = explorer_html(BOTH, "the the")
    assert "<b>small</b> (261 rows): 2 tokens, 3.50 bytes and 3.50 characters each" in page
    assert "<b>bytes</b> (257 rows): 7 tokens, 1.00 bytes and 1.00 characters each" in page
    assert "1 token, 2.00 bytes" not in explorer_html(BOTH, "h")
    assert "<b>bytes</b> (257 rows): 3 tokens, 1.00 bytes and 0.33 characters each" in (
        explorer_html(BOTH, "北")
    )
    assert "0 tokens</p>" in explorer_html(BOTH, "")
    long = explorer_html({"bytes": BYTES}, "x" * 2000)
    assert "2,000 tokens" in long and "… and 500 more tokens." in long
    assert len(shown(long)) == 1500


def test_names_and_text_are_escaped():
    page = explorer_html({"<i>": SMALL}, "<b>")
    assert "<i>" not in page and page.count("<b>") == 1 and "&lt;i&gt;" in page
    assert page.count("&lt;") == 2


def test_without_a_front_end_it_is_static():
    from IPython.display import HTML

    page = explorer(BOTH, "the")
    assert isinstance(page, HTML)
    assert page.data == explorer_html(BOTH, "the")
    with pytest.raises(ValueError, match="at least one vocabulary"):
        explorer({}, "the")


def test_widget_follows_text_and_choice():
    pytest.importorskip("ipywidgets")
    box = explorer(BOTH, "the", interactive=True)
    area, choice, view = box.children
    assert view.value == explorer_html(BOTH, "the")
    area.value = "the 🙂"
    assert view.value == explorer_html(BOTH, "the 🙂")
    choice.value = ("bytes",)
    assert view.value == explorer_html({"bytes": BYTES}, "the 🙂")
    area.value = ""
    assert view.value == explorer_html({"bytes": BYTES}, "")
    assert [name for name, _ in choice.options] == ["all", "small", "bytes"]


def test_widget_outlives_half_a_character():
    pytest.importorskip("ipywidgets")

    class Strict:
        control, vocab_size = SMALL.control, SMALL.vocab_size
        token_bytes = SMALL.token_bytes

        def encode_with_offsets(self, text):
            if "\ud83d" in text:
                raise ValueError("a lone surrogate <")
            return SMALL.encode_with_offsets(text)

    area, _, view = explorer({"strict": Strict()}, "the", interactive=True).children
    area.value = "\ud83d"
    assert view.value == "a lone surrogate &lt;"
    area.value = "he"
    assert shown(view.value) == ["he"]


def test_without_ipywidgets(monkeypatch):
    from qwenlib.tokenizer import view

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"pip install 'qwenlib\[notebooks\]'"):
        explorer(BOTH, "the", interactive=True)
    monkeypatch.setattr(view, "_sent_by_front_end", lambda: True)
    assert explorer(BOTH, "the").data == explorer_html(BOTH, "the")


CELL = """
from qwenlib.tokenizer.gpt2 import GPT2Tokenizer
from qwenlib.tokenizer.view import explorer
explorer({"bytes": GPT2Tokenizer([])}, "the")
"""


@pytest.fixture(scope="module")
def kernel():
    manager = pytest.importorskip("jupyter_client.manager")
    manager, client = manager.start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_cell(client, metadata):
    """MIME bundle of the value of CELL, sent with the metadata of a front end or without."""
    content = {"code": CELL, "silent": False, "store_history": True, "user_expressions": {},
               "allow_stdin": False, "stop_on_error": True}  # fmt: skip
    message = client.session.msg("execute_request", content, metadata=metadata)
    client.shell_channel.send(message)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        reply = client.get_iopub_msg(timeout=60)
        if reply["parent_header"].get("msg_id") != message["header"]["msg_id"]:
            continue
        assert reply["msg_type"] != "error", reply["content"]["traceback"]
        if reply["msg_type"] == "execute_result":
            return reply["content"]["data"]
    raise AssertionError("no value in a minute")


def test_a_front_end_gets_the_widget_and_a_batch_run_the_page(kernel):
    pytest.importorskip("ipywidgets")
    # As papermill, nbclient and nbconvert send a cell.
    batch = run_cell(kernel, {})
    assert WIDGET not in batch
    assert batch["text/html"] == explorer_html({"bytes": BYTES}, "the")
    # As JupyterLab and VS Code send it.
    live = run_cell(kernel, {"cellId": "4f3a"})
    assert WIDGET in live
