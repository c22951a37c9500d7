"""The text of a file's bytes, whatever their encoding: one reader for castle.py, gallica.py and collect.py.

    decode(b"l'\\xe9t\\xe9", "roman.txt")     "l'été", as CP1252
    repaired("l'Ã©tÃ©", "roman.txt")      "l'été"

UTF-8, and UTF-16 and UTF-32 with their marks, say what they are. Other bytes are read in the encoding that makes most of
their accented words French, and so is a text that was wrongly decoded before it came here. What remains unclear raises
BadInput, since wrong letters would be learned.
"""

import codecs
import re
from collections.abc import Iterable

from prep.common import BadInput
from prep.filters import known_share, lexicon, samples

LEGACY = ("cp1252", "cp850", "mac_roman", "iso8859_15")
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ACCENTED = re.compile(r"[a-zà-ÿœæ]*[^\W\d_a-z][^\W\d_]*")
_BYTES = {bytes([n]).decode("cp1252", "ignore") or chr(n): n for n in range(128, 256)} | {
    chr(n): n for n in range(128, 160)
}
_TRAIL = "".join(re.escape(c) for c, n in _BYTES.items() if n < 0xC0)
# Ã©, â€™; "Ã " has lost its no-break space
_TWICE = re.compile(f"[ÂÃÅ][{_TRAIL}]|â[€‚„\u0080\u0082\u0084][{_TRAIL}]|Ã(?= )")
_C1 = re.compile("[\u0080-\u009f]")
_CODES = re.compile(  # é in a mail, a URL, UTF-7, TeX, HTML without its ";"
    r"=[0-9A-F]{2}|%[0-9A-F]{2}|\+A[\w+/]{2,}-|\\['`^\"c]\{?[A-Za-z]|&[a-zA-Z](?:acute|grave|circ|uml|cedil)(?!;)"
)
_LOST_OE = re.compile(r"[?½¼](?=u|il)([^\W\d_]+)", re.I)  # "c?ur" from Latin-1, "c½ur" from Latin-9
_HEAD = re.compile(r"[^\W\d_]*$")
# For a file that is UTF-8 in one part and CP1252 in another.
codecs.register_error("cp1252", lambda e: (e.object[e.start : e.end].decode("cp1252", "replace"), e.end))  # type: ignore[attr-defined]


def decode(data: bytes, name: str) -> str:
    """The text of bytes; `name` is for the message of BadInput."""
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8-sig")
    for half, without_mark in enumerate(("utf-16-be", "utf-16-le")):
        if encoding == "utf-8-sig" and data[half:10_000:2].count(0) > 0.6 * len(data[half:10_000:2]):
            encoding = without_mark
    text = _strict(data, encoding)
    if text is None and encoding == "utf-8-sig":
        share, text = _most_french([*(_strict(data, legacy) for legacy in LEGACY), data.decode("utf-8", "cp1252")])
        if share < 0.3:
            raise BadInput(f"{name} is not in UTF-8, and in no other encoding is it French: convert it to UTF-8")
    text = text and text.rstrip("\0")  # of a file whose end was never written
    if text is None or sum(text.count(chr(c)) for c in (*range(9), *range(14, 32))) > len(text) // 1000:
        raise BadInput(f"{name} is neither a PDF nor a text in a known encoding: convert it to UTF-8")
    return text


def _strict(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        whole = data[: error.start]
        cut = error.end == len(data) and not whole.isascii()  # the file's end is in the middle of a character
        return whole.decode(encoding) if cut else None


def _most_french(readings: Iterable[str | None]) -> tuple[float, str]:
    """The first of the readings with the largest share of French among its different accented words, and this share.

    A few words prove little: without any, the share is 0.5.
    """
    best, most = "", -1.0
    for text in filter(None, readings):
        words = {word.replace("œ", "oe") for word in _ACCENTED.findall(text.lower()) if not word.isascii()}
        share = (len(words & lexicon()) + 2) / (len(words) + 4)
        if share > most:
            best, most = text, share
    return most, best


def _misread(text: str) -> Iterable[str | None]:
    """What a text may be that was decoded in a wrong encoding."""
    for wrong in ("latin-1", *LEGACY):
        try:
            data = text.encode(wrong)
        except UnicodeEncodeError:
            continue
        yield from (_strict(data, right) for right in ("utf-8", *LEGACY) if right != wrong)


def repaired(text: str, name: str) -> str:
    """A text with the letters it had before it was wrongly decoded; BadInput where they are lost."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # RTF and PDF give the halves of a pair
    while len(_TWICE.findall(text)) > len(text) // 10_000:  # UTF-8 taken for Latin-1 or CP1252, once or more
        text = _TWICE.sub(lambda m: bytes(_BYTES[c] for c in m[0]).decode("utf-8", "ignore") or "à", text)
    marks = {ord(c): c.encode("latin-1").decode("cp1252", "replace") for c in set(_C1.findall(text))}
    if marks or _most_french(["\n".join(samples(text))])[0] < 0.3:
        share, other = _most_french([text.translate(marks), *_misread(text)])
        text = other if share > 0.5 else text.translate(marks)
    text = _LOST_OE.sub(_with_oe, text)
    sample = "\n".join(samples(text))
    letters = sum(map(str.isalpha, sample))
    for lost, sign, limit in (
        (text.count("\ufffd"), "are U+FFFD", len(text) // 10_000),
        (len(re.findall(r"(?<=[^\W\d_])\?(?=[^\W\d_])", sample)), "are question marks", letters // 200 + 5),
        (len(_CODES.findall(sample)), "are codes such as =E9 or \\'e", letters // 200),
    ):
        if lost > limit:
            raise BadInput(f"{name} has lost {lost:,} letters (they {sign}): convert it to UTF-8 again from its source")
    text = text.replace("\ufffd", "")  # too few to be refused
    if letters > 3_000 and sum("À" <= c < "\u2000" for c in sample) < letters // 500 and known_share(text) > 0.6:
        raise BadInput(f"{name} is French without accents: give an edition that has them")
    return text


def _with_oe(match: re.Match[str]) -> str:
    """A word with its œ, where it is French only so; "Vraiment?il" stays."""
    head = _HEAD.search(match.string, max(0, match.start() - 20), match.start())[0].lower()  # type: ignore[index]
    tail = match[1].lower()
    if f"{head}oe{tail}" in lexicon() and (head or match[0][0] != "?" or tail not in lexicon()):
        return ("Œ" if match[1].isupper() or match[0][0] == "¼" else "œ") + match[1]
    return match[0]
