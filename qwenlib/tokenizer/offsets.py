"""Where in a text its tokens stand."""

import unicodedata
from collections.abc import Sequence

from qwenlib.tokenizer.normal_form import normalise


def token_places(text: str, tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """(start, end) in characters of `text` for each token; the tokens spell its normal form.

    A token that holds a part of a character has the place of the whole character, and a character
    that normal form C made of several has the place of all of them.
    """
    # For each byte of the normal form, the place of its character.
    at_byte = [
        place
        for character, place in zip(normalise(text), character_places(text), strict=True)
        for _ in character.encode()
    ]
    places, begin = [], 0
    for token in tokens:
        end = begin + len(token)
        places.append((at_byte[begin][0], at_byte[end - 1][1]))
        begin = end
    return places


def character_places(text: str) -> list[tuple[int, int]]:
    """(start, end) in `text` for each character of its normal form."""
    if normalise(text) == text:
        return [(i, i + 1) for i in range(len(text))]
    places, begin = [], 0
    for end in range(1, len(text) + 1):
        if end < len(text) and not _cut_before(text, begin, end):
            continue
        part = text[begin:end]
        normal = normalise(part)
        if normal == part:
            places += [(i, i + 1) for i in range(begin, end)]
        else:
            places += [(begin, end)] * len(normal)
        begin = end
    return places


def _cut_before(text: str, begin: int, at: int) -> bool:
    """Whether text[begin:at] has its normal form whatever follows."""
    # Not the character's own class: some are of class 0 and fall apart into marks.
    if unicodedata.combining(unicodedata.normalize("NFD", text[at])[0]):
        return False
    before = text[begin:at]
    return normalise(before + text[at]) == normalise(before) + normalise(text[at])
