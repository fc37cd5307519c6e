"""Unicode normal form C, as the release applies it."""

import unicodedata

from tokenizers import normalizers

_NFC = normalizers.NFC()


def check_text(text: object) -> None:
    """TypeError for anything but a str; ValueError for one with a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"a text is a str, not {type(text).__name__}: {text!r:.60}")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, "
            "which is no character; text.encode('utf-16', 'surrogatepass').decode('utf-16', "
            "'replace') repairs it"
        ) from None


def normalise(text: str) -> str:
    """`text` in normal form C. TypeError for anything but a str; ValueError for a lone surrogate.

    The released tokenizer normalises with the `tokenizers` library, whose tables end at Unicode 9:
    it leaves younger combining marks in the order in which they stand, where Python sorts them. A
    text that is normal by Python's younger tables is so by older ones, which compose and sort less;
    so the fast test decides for nearly every text, and the library writes the rest.
    """
    check_text(text)
    if text.isascii():
        return text
    return text if unicodedata.is_normalized("NFC", text) else _NFC.normalize_str(text)
