"""Token views for notebooks: coloured HTML, merges as a table, a widget to type in."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwenlib.tokenizer.bpe import Merge, merge_steps

_BANDS = ("#e8eef7", "#d3e0f0")  # neighbouring tokens alternate
_TARGET = ("#c6e7c8", "#a9d8ad")
_CONTROL = "#f6d9a8"
_MOST_TOKENS = 1_500  # of one view: a browser grows slow beyond
_MOST_WORDS, _MOST_ROWS, _MOST_BYTES = 12, 150, 96  # of one table of merges, and of a word in it
_MARKS = str.maketrans(
    {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    # The bytes that decoding with "surrogateescape" could not read.
    | {0xDC00 + byte: f"<{byte:02x}>" for byte in range(0x80, 0x100)}
)


class Readable(Protocol):
    """What a view needs of a vocabulary: `Tokenizer` and `GPT2Tokenizer` have it."""

    control: dict[str, int]

    @property
    def vocab_size(self) -> int: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def token_html(
    tokenizer: Readable,
    ids: Sequence[int],
    mask: Sequence[int] | None = None,
    offsets: Sequence[tuple[int, int]] | None = None,
) -> str:
    """HTML of `ids`, one span a token with its id as tooltip; bytes of split characters in hex.

    Control tokens are orange; with a `mask`, targets (1) are green and underlined, and a control
    token that is a target keeps its colour and gains the underline. With `offsets`, the tooltip
    also says which characters of the text a token covers. ValueError when `mask` or `offsets` has
    another length than `ids`.
    """
    for name, given in (("mask entries", mask), ("offsets", offsets)):
        if given is not None and len(given) != len(ids):
            raise ValueError(f"{len(ids)} ids but {len(given)} {name}")
    control_ids = set(tokenizer.control.values())
    spans = []
    for n, token_id in enumerate(ids):
        target = bool(mask is not None and mask[n])
        colour = _CONTROL if token_id in control_ids else (_TARGET if target else _BANDS)[n % 2]
        title = f"{token_id}"
        if offsets is not None:
            title += " · characters {} to {}".format(*offsets[n])
        spans.append(_span(tokenizer.token_bytes(token_id), colour, title, target))
    return _block(spans)


def pieces_html(pieces: Sequence[str]) -> str:
    """HTML of a text cut into `pieces`, such as pre-tokens, as one line; the first 1,500."""
    shown = enumerate(pieces[:_MOST_TOKENS])
    spans = [_span(piece.encode(), _BANDS[n % 2], "", lines=False) for n, piece in shown]
    return _block(spans) + _left_out(len(pieces) - _MOST_TOKENS, "piece")


def merges_html(
    words: Sequence[str], ranks: Mapping[Merge, int], made: Mapping[bytes, int] | None = None
) -> str:
    """Table of the merges that encode pre-tokens `words`: rank, parts, state after each.

    `ranks` maps a merge to its place; `made`, if given, maps a token to how often training made it.
    Shown are the first pre-tokens, at most 12 and about 150 rows, none longer than 96 bytes; the
    table says what it leaves out.
    """
    heads = ["merge", "joins", *(["times in training"] if made is not None else []), "tokens now"]
    none = [""] * (len(heads) - 2)
    rows: list[str] = []
    shown = 0
    for word in words[:_MOST_WORDS]:
        if len(rows) >= _MOST_ROWS:
            break
        raw, band = word.encode(), _BANDS[shown % 2]
        shown += 1
        if len(raw) > _MOST_BYTES:
            rows.append(_row(["bytes", *none, f"{len(raw):,}, too many for this table"], band))
            continue
        steps = merge_steps(raw, ranks)
        rows.append(_row(["bytes", *none, _parts(steps[0])], band))
        for before, after in zip(steps, steps[1:], strict=False):
            at = next(i for i, part in enumerate(after) if part != before[i])
            left, right = before[at : at + 2]
            cells = [f"{ranks[left, right] + 1:,}", _parts([left, right])]
            if made is not None:
                cells.append(f"{made.get(left + right, 0):,}")
            rows.append(_row([*cells, _parts(after, bold=at)], ""))
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in heads)
    note = _left_out(len(words) - shown, "pre-token") if words else "No text, no bytes."
    return (
        f'<table style="font-family:monospace;text-align:left"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{note}"
    )


def explorer(tokenizers: Mapping[str, Readable], text: str, interactive: bool | None = None) -> Any:
    """Token view of `text` in each of the named vocabularies, as the last value of a cell.

    In a notebook front end (JupyterLab, VS Code) it is a widget: a text to edit and a choice of
    vocabulary. Anywhere else (papermill, nbconvert, no ipywidgets) it is static HTML of the same
    view. `interactive` decides instead; True without ipywidgets raises ImportError.
    """
    if not tokenizers:
        raise ValueError("explorer() needs at least one vocabulary")
    live = _sent_by_front_end() if interactive is None else interactive
    if live:
        try:
            import ipywidgets
        except ImportError as error:
            if interactive:
                raise ImportError(
                    "the explorer's widget needs ipywidgets: pip install 'qwenlib[notebooks]'"
                ) from error
        else:
            return _widget(ipywidgets, tokenizers, text)
    from IPython.display import HTML

    return HTML(explorer_html(tokenizers, text))


def explorer_html(tokenizers: Mapping[str, Readable], text: str) -> str:
    """The explorer's view: for each vocabulary its counts and the first 1,500 tokens of `text`."""
    n_bytes = len(text.encode("utf-8", "replace"))
    parts = []
    for name, tokenizer in tokenizers.items():
        ids, offsets = tokenizer.encode_with_offsets(text)
        shown = slice(_MOST_TOKENS)
        counts = f"{len(ids):,} token{'s' * (len(ids) != 1)}"
        if ids:
            counts += (
                f", {n_bytes / len(ids):.2f} bytes and {len(text) / len(ids):.2f} characters each"
            )
        parts.append(
            f'<p style="margin:0.8em 0 0.2em">'
            f"<b>{html.escape(name)}</b> ({tokenizer.vocab_size:,} rows): {counts}</p>"
            + token_html(tokenizer, ids[shown], offsets=offsets[shown])
            + _left_out(len(ids) - _MOST_TOKENS, "token")
        )
    return "".join(parts)


def token_text(token: bytes) -> str:
    """One token on a line: space as ·, newline as ⏎, bytes of a split character in hex."""
    return token.decode("utf-8", "surrogateescape").translate(_MARKS)


def _sent_by_front_end() -> bool:
    """Whether a notebook front end sent the running cell.

    A front end names the cell with its request; papermill, nbclient and nbconvert send code alone.
    The environment does not tell: it is inherited by a papermill that was started from a notebook.
    """
    try:
        from IPython import get_ipython

        request = get_ipython().kernel.get_parent()
    except (ImportError, AttributeError):  # no IPython, no shell, or a shell without a kernel
        return False
    return "cellId" in request.get("metadata", {})


def _widget(ipywidgets: Any, tokenizers: Mapping[str, Readable], text: str) -> Any:
    area = ipywidgets.Textarea(
        value=text, rows=4, layout=ipywidgets.Layout(width="100%"), continuous_update=True
    )
    choice = ipywidgets.Dropdown(
        options=[("all", tuple(tokenizers)), *((name, (name,)) for name in tokenizers)],
        description="vocabulary",
    )
    view = ipywidgets.HTML()

    def update(_: Any = None) -> None:
        chosen = {name: tokenizers[name] for name in choice.value}
        try:
            view.value = explorer_html(chosen, area.value)
        except ValueError as error:  # half a character, for a moment, while an emoji is typed
            view.value = html.escape(str(error))

    area.observe(update, "value")
    choice.observe(update, "value")
    update()
    return ipywidgets.VBox([area, choice, view])


def _span(token: bytes, colour: str, title: str, target: bool = False, lines: bool = True) -> str:
    # The line break goes after the mark, so that the view keeps the lines of the text. The thin
    # space lets a browser wrap, and parts tokens where colours are stripped.
    breaks = "<br>" * token.count(b"\n") if lines else ""
    border = "border-bottom:3px solid #2c7a33;" if target else ""
    tooltip = f' title="{title}"' if title else ""
    return (
        f'<span{tooltip} style="background:{colour};color:#111;{border}border-radius:3px">'
        f"{html.escape(token_text(token))}</span>&thinsp;{breaks}"
    )


def _block(spans: Sequence[str]) -> str:
    return (
        '<div style="font-family:monospace;line-height:1.9;overflow-wrap:anywhere;'
        f'text-align:left">{"".join(spans)}</div>'
    )


def _row(cells: Sequence[str], colour: str) -> str:
    background = f' style="background:{colour};color:#111"' if colour else ""
    content = "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells)
    return f"<tr{background}>{content}</tr>"


def _parts(tokens: Sequence[bytes], bold: int = -1) -> str:
    shown = [html.escape(token_text(token)) for token in tokens]
    return "&ensp;".join(f"<b>{t}</b>" if i == bold else t for i, t in enumerate(shown))


def _left_out(count: int, what: str) -> str:
    return f"<p>… and {count:,} more {what}{'s' * (count != 1)}.</p>" if count > 0 else ""
