"""Token views for notebooks: tokens as coloured HTML spans."""

import html
from collections.abc import Sequence

from qwenlib.tokenizer.tokenizer import Tokenizer

_BANDS = ("#e8eef7", "#d3e0f0")  # neighbouring tokens alternate
_TARGET = ("#c6e7c8", "#a9d8ad")
_CONTROL = "#f6d9a8"


def token_html(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int] | None = None) -> str:
    """HTML of `ids`, one span a token with its id as tooltip; bytes of split characters in hex.

    Control tokens are orange; with a `mask`, targets (1) are green and underlined, and a control
    token that is a target keeps its colour and gains the underline. ValueError when the lengths of
    `ids` and `mask` differ.
    """
    if mask is not None and len(mask) != len(ids):
        raise ValueError(f"{len(ids)} ids but {len(mask)} mask entries")
    control_ids = set(tokenizer.control.values())
    spans = []
    for n, token_id in enumerate(ids):
        target = bool(mask is not None and mask[n])
        colour = _CONTROL if token_id in control_ids else (_TARGET if target else _BANDS)[n % 2]
        border = "border-bottom:3px solid #2c7a33;" if target else ""
        shown = _shown(tokenizer.token_bytes(token_id))
        spans.append(
            f'<span title="{token_id}" style="background:{colour};color:#111;{border}'
            f'border-radius:3px;margin:0 1px">{shown}</span>'
        )
    body = "".join(spans)
    return (
        '<div style="font-family:monospace;line-height:1.9;overflow-wrap:anywhere;'
        f'text-align:left">{body}</div>'
    )


def token_text(token: bytes) -> str:
    """One token on a line: space as ·, newline as ⏎, bytes of a split character in hex."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in token)
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _shown(token: bytes) -> str:
    # The line break goes after the mark, so that the view keeps the lines of the text. A zero-width
    # space at a token's end lets the browser wrap there.
    breaks = "<br>" * token.count(b"\n")
    return html.escape(token_text(token)) + breaks + "&#8203;"
