"""One typographic convention for all French text, whatever the habits of scans, transcriptions and PDFs.

    to_convention("–Oui…dit—il")     "— Oui...dit-il"

Apostrophe ' (U+0027); « x » with plain spaces inside; a plain space before ; : ! ? and none before , and . ; ellipsis ...;
a line of dialogue begins with "— ", and a dash inside a line is " — "; NFC; œ kept; no entity, ligature, no-break or
invisible character.

At the start of a line every dash opens dialogue, and a hyphen does unless a small letter or a digit follows it ("-même",
"-5"). Inside a line an em dash, "--", and any dash or hyphen between spaces is a dash. Between two letters or digits
without spaces, an en dash is a hyphen ("Paris–Lyon"), and so is an em dash before a pronoun ("dit—il", as scans have it).
"""

import html
import re
import unicodedata
from html.entities import html5

_APOSTROPHES = "’‘ʼʹ‛′´`＇ˈ"
_SPACES = "\t\v\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufffc\u007f" + "".join(
    chr(n) for n in range(32) if chr(n) not in "\t\n\v\f\r"
)
_CHARACTERS = {
    **dict.fromkeys(_APOSTROPHES, "'"),
    **dict.fromkeys(_SPACES, " "),
    **dict.fromkeys(_INVISIBLE, ""),
    **dict.fromkeys("\u2028\u2029", "\n"),
    **dict.fromkeys("‐‑−", "-"),
    **dict.fromkeys("―‒─⸺", "—"),
    **dict.fromkeys("“„‟‹", "«"),
    **dict.fromkeys("”›", "»"),
    **{"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "ſ": "s", "¬": "-"},
}
_LETTER = r"[^\W\d_]"
_PRONOUN = "(?:je|tu|il|elle|on|nous|vous|ils|elles|ce|t-il|t-elle|t-on|moi|toi|lui|leur|là|ci|mêmes?)\\b"

# (a string without which the rule does nothing, a pattern or a string, its replacement). Patterns begin with a plain
# character and look behind it afterwards, which makes them as fast as a search for that character.
_RULES: list[tuple[str, re.Pattern[str] | str, str]] = [
    ("<<", "<<", "«"),
    (">>", ">>", "»"),
    ('"', re.compile(r"""\"(?<![^\s(«'—-]")(?=\S)"""), "«"),
    ('"', re.compile(r'"(?<=\S")(?=[\s).,;:!?»-])'), "»"),
    ("…", "…", "..."),
    (". .", re.compile(r"\. \. \.(?: \.)*"), "..."),
    ("–", re.compile(rf"–(?:(?<=\d–)(?=\d)|(?<={_LETTER}–)(?={_LETTER}))"), "-"),
    ("—", re.compile(rf"—(?:(?<=\d—)(?=\d)|(?<={_LETTER}—)(?={_PRONOUN}))"), "-"),
    ("–", "–", "—"),
    ("--", re.compile("--+"), "—"),
    ("—", "—", " — "),
    ("«", "«", " « "),
    ("»", "»", " » "),
    (";", re.compile(rf";(?={_LETTER})"), "; "),
    ("!", re.compile(rf"!(?={_LETTER})"), "! "),
    ("?", re.compile(rf"\?(?={_LETTER})"), "? "),
    ("", re.compile(r"[;:!?](?<![\s;:!?(].)(?!(?<=:)//|(?<=\d:)\d)"), r" \g<0>"),
    ("  ", re.compile("  +"), " "),
    *((f" {mark}", f" {mark}", mark) for mark in ",)]\n"),
    *((f"{mark} ", f"{mark} ", mark) for mark in "([\n"),
    (" -", re.compile(r" -(?=[ ,])(?!(?<=\d -) *\d)"), " —"),
    ("\n-", re.compile(r"\n- ?(?=\n|[^\w\s-]|[A-ZÀ-ÖØ-ÞŒ]|(?<= ))"), "\n— "),
    ("— —", re.compile("—(?: —)+"), "—"),
    ("' «", "' «", "'«"),
    (" .", re.compile(r" \.(?!\.)"), "."),
    ("....", re.compile(r"\.\.\.\.+"), "..."),
]
# Only what ends in ";" is an entity, named or numbered: "&c" and "R&D" are text.
_ENTITY = re.compile(r"&(?:#(?:\d{1,7}|[xX][\da-fA-F]{1,6});|([a-zA-Z]\w*;))")
_RARE = re.compile("[" + re.escape("".join(_CHARACTERS)) + "]")


def clean_characters(text: str) -> str:
    """Entities, apostrophes, spaces and ligatures in the convention, in NFC, with `\\n` line ends; form feeds and dashes stay.

    A soft hyphen at a line's end becomes a hyphen (it broke a word there) and vanishes elsewhere.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "&" in text:
        text = _ENTITY.sub(
            lambda match: html.unescape(match[0]) if match[1] is None or match[1] in html5 else match[0], text
        )
    if "\u00ad" in text:
        text = re.sub("\u00ad(?= *$)", "-", text, flags=re.M).replace("\u00ad", "")
    text = unicodedata.normalize("NFC", text)
    return _RARE.sub(lambda match: _CHARACTERS[match[0]], text)


def to_convention(text: str) -> str:
    """The text in the convention; its lines are paragraphs, and stay lines."""
    text = f"\n{clean_characters(text)}\n"  # so that the rules see a line end on both sides of every line
    for needle, pattern, replacement in _RULES:
        if needle in text:
            text = text.replace(pattern, replacement) if isinstance(pattern, str) else pattern.sub(replacement, text)
    return text[1:-1]
