"""The text of a file's bytes, whatever their encoding: one reader for castle.py, gallica.py and collect.py.

    decode(b"l'\\xe9t\\xe9", "roman.txt")     "l'été", as CP1252

UTF-8, and UTF-16 with its mark, say what they are. Other bytes are read as CP1252, CP850 or Mac Roman, whichever makes most
accented words French. Twice encoded UTF-8 and CP1252 taken for Latin-1 are repaired where that is certain; what
remains unclear raises BadInput, since wrong letters would be learned.
"""

import re

from prep.common import BadInput
from prep.filters import lexicon

LEGACY = ("cp1252", "cp850", "mac_roman")
_ACCENTED = re.compile(r"[a-zà-ÿœæ]*[^\W\d_a-z][^\W\d_]*")
_TWICE = re.compile(r"[ÃÂ][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]|â€")
_C1 = re.compile("[\u0080-\u009f]")


def decode(data: bytes, name: str) -> str:
    """The text of bytes; `name` is for the message of BadInput."""
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = _strict(data, "utf-16" if marked else "utf-8-sig")
    if not marked:
        text = _legacy(data, name) if text is None else repaired(text, name)
    if text is None or sum(text.count(chr(c)) for c in (*range(9), *range(14, 32))) > len(text) // 1000:
        raise BadInput(f"{name} is neither a PDF nor a text in a known encoding: convert it to UTF-8")
    if (lost := text.count("\ufffd")) > len(text) // 10_000:
        raise BadInput(f"{name} has lost {lost:,} letters (they are U+FFFD): convert it to UTF-8 again from its source")
    return text


def _strict(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def repaired(text: str, name: str) -> str:
    """A text that was wrongly decoded before it came here: UTF-8 or CP1252 taken for Latin-1."""
    if len(_TWICE.findall(text)) > len(text) // 10_000:
        for encoding in ("latin-1", "cp1252"):
            try:
                return repaired(text.encode(encoding).decode("utf-8"), name)
            except UnicodeError:
                continue
        raise BadInput(f"{name} is UTF-8 encoded twice, in part (it has Ã© for é): convert it again from its source")
    marks = {ord(c): c.encode("latin-1").decode("cp1252", "replace") for c in set(_C1.findall(text))}
    if "\ufffd" in marks.values():
        raise BadInput(
            f"{name} has control characters (U+0080 to U+009F) for letters: convert it again from its source"
        )
    return text.translate(marks) if marks else text


def _legacy(data: bytes, name: str) -> str | None:
    """The text in the encoding in which most of its different accented words are French; of equal ones the first."""
    best, most, seen = None, -1.0, 0
    for encoding in LEGACY:
        if (text := _strict(data, encoding)) is not None:
            words = {word for word in _ACCENTED.findall(text.lower()) if not word.isascii()}
            share = len(words & lexicon()) / max(1, len(words))
            if share > most:
                best, most, seen = text, share, len(words)
    if seen >= 5 and most < 0.3:
        raise BadInput(f"{name} is not in UTF-8, and in no other encoding are its words French: convert it to UTF-8")
    return best
